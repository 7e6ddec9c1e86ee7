// Shows a task and sends what is said of it. Texts become nodes by textContent alone: nobody knows what they hold.
"use strict";

const $ = (id) => document.getElementById(id);
const choose = $("main").dataset.choose;
let task = null;
let grade = null;
let picks = []; // of a ranking: {number, level}, the best first; `level` where it is as good as the one before
let isLevel = false;
let isBusy = false;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const isPair = () => task !== null && task.responses.length === 2;
const isRanking = () => task !== null && !isPair() && choose === "rank";

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

async function ask(action, fields = {}) {
  const response = await fetch(`/api/${action}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(fields),
  });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error), { status: response.status });
  return answer;
}

async function act(action, fields, done) {
  if (isBusy) return; // a key that is held down answers once
  isBusy = true;
  document.body.classList.add("busy");
  try {
    show(await ask(action, fields));
    say(done || hint());
    if (task?.previous) recall(task.previous);
  } catch (error) {
    if (error.status === 401) location.assign("/");
    say(error.status ? error.message : "The server does not answer. Nothing was lost: try again.", true);
  } finally {
    isBusy = false;
    document.body.classList.remove("busy");
  }
}

function answer(verdict, ranks, done) {
  if (task === null) return;
  const better = verdict === "preference" && isPair() && ranks[0] !== ranks[1];
  const fields = { task: task.task, order: task.shown, verdict, comment: $("comment").value || null };
  if (ranks) fields.ranks = ranks;
  if (better) fields.grade = grade;
  act("answer", fields, done);
}

function show(state) {
  task = state.task;
  picks = [];
  isLevel = false;
  setGrade(null);
  $("comment").value = "";
  $("nothing").hidden = task !== null;
  $("prompt").hidden = $("tools").hidden = task === null;
  $("grades").hidden = !isPair();
  $("submit").hidden = !isRanking();
  $("help").dataset.mode = isPair() || task === null ? "pair" : choose;
  $("prompt").replaceChildren(...(task?.prompt ?? []).map(turn));
  $("responses").replaceChildren(...(task?.responses ?? []).map(card));
  $("responses").dataset.count = task?.responses.length ?? 0;
  showProgress(state.progress);
  drawRanking();
  scrollTo(0, 0);
  $("prompt").scrollTop = $("prompt").scrollHeight; // of a long conversation the last turns are seen first
}

function turn({ role, content }) {
  const made = element("div", role ? "turn" : "text");
  if (role) {
    made.dataset.role = role.toLowerCase();
    made.append(element("span", "role", role));
  }
  made.append(element("div", "content", content));
  return made;
}

function card(text, number) {
  const made = element("article", "panel card");
  const button = element("button", "choose");
  button.type = "button";
  button.append(element("kbd", "", String(number + 1)), element("span", "label", label()));
  button.addEventListener("click", () => pick(number));
  made.append(button, element("div", "content", text));
  if (text.trim() === "") made.lastChild.replaceChildren(element("em", "empty", text ? "(blank)" : "(empty)"));
  return made;
}

function hint() {
  if (task === null) return "";
  return isRanking() ? "Put them in order, the best first: press their numbers, or click." : "Press a number, or click.";
}

function label() {
  if (isRanking()) return "Give it the next place";
  return isPair() ? "This one is better" : "This one is the best";
}

function showProgress({ tasks, done, flagged, yours, alpha, units }) {
  const parts = [`${done} of ${tasks} done`, `${yours} by you`];
  if (flagged) parts.push(`${flagged} flagged`);
  if (alpha !== null) parts.push(`agreement α ${alpha.toFixed(2)} over ${units}`);
  $("progress").replaceChildren(...parts.map((part) => element("span", "", part)));
  $("bar").style.inlineSize = `${tasks ? (100 * done) / tasks : 0}%`;
}

function recall({ verdict, ranks, grade: given, comment }) {
  setGrade(given);
  $("comment").value = comment ?? "";
  const words = { skip: "skipped it", flag: "flagged it" };
  if (ranks) words.preference = ranks.every((rank) => rank === 1) ? "found them equally good" : better(ranks);
  say(`Undone. You had ${words[verdict]}: say it anew.`);
}

function better(ranks) {
  const order = ranks.map((_, number) => number).sort((a, b) => ranks[a] - ranks[b]);
  if (ranks.length === 2) return `found ${order[0] + 1} better`;
  return `ranked them ${order.map((n, i) => `${i ? (ranks[n] === ranks[order[i - 1]] ? " = " : " > ") : ""}${n + 1}`).join("")}`;
}

function setGrade(value) {
  grade = value === grade ? null : value; // pressed twice, it is off
  for (const button of $("grades").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.grade) === grade));
  }
}

function pick(number) {
  if (task === null || number >= task.responses.length) return;
  if (!isRanking()) {
    const ranks = task.responses.map((_, other) => (other === number ? 1 : 2));
    answer("preference", ranks, isPair() ? `${number + 1} is better.` : `${number + 1} is the best.`);
  } else if (!picks.some((one) => one.number === number)) {
    picks.push({ number, isLevel: isLevel && picks.length > 0 });
    isLevel = false;
    drawRanking();
  }
}

function places() {
  const ranks = task.responses.map(() => null);
  let place = 0;
  for (const one of picks) ranks[one.number] = one.isLevel ? place : ++place;
  const left = ranks.filter((rank) => rank === null).length;
  return left === 1 && !isLevel ? ranks.map((rank) => rank ?? place + 1) : ranks;
}

function drawRanking() {
  if (!isRanking()) return;
  const ranks = places();
  [...$("responses").children].forEach((made, number) => {
    const place = ranks[number];
    made.classList.toggle("placed", place !== null);
    made.querySelector(".label").textContent = place === null ? label() : `Place ${place}`;
  });
  $("submit").disabled = ranks.includes(null);
  if (isLevel) say("The next one is as good as the one before.");
}

function submit() {
  const ranks = places();
  if (ranks.includes(null)) say("Give every response a place first: press their numbers, the best first.", true);
  else answer("preference", ranks, `You ${better(ranks)}.`);
}

function tie() {
  if (task === null) return;
  if (isRanking() && picks.length) {
    isLevel = !isLevel;
    drawRanking();
  } else {
    answer("preference", task.responses.map(() => 1), "Equally good.");
  }
}

const keys = {
  "=": tie,
  s: () => answer("skip", null, "Skipped."),
  f: () => answer("flag", null, "Flagged: nobody else will see it."),
  u: () => act("undo", {}, "Undone."),
  c: () => $("comment").focus(),
  "?": () => $("help").showModal(),
  Enter: () => isRanking() && submit(),
  Backspace: () => isRanking() && takeBack(),
  ArrowLeft: () => isPair() && pick(0),
  ArrowRight: () => isPair() && pick(1),
};
"qwe".split("").forEach((key, number) => {
  keys[key] = () => isPair() && setGrade(number + 1);
});

function takeBack() {
  if (isLevel) isLevel = false;
  else picks.pop();
  drawRanking();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || $("help").open) return;
  if (event.isComposing || event.keyCode === 229) return; // Enter chooses a character then; Safari says it so
  if (event.target === $("comment")) {
    if (event.key === "Escape" || event.key === "Enter") $("comment").blur();
    return;
  }
  // Enter and the space bar press the button that has the focus.
  if (event.target.closest("button, a") && (event.key === "Enter" || event.key === " ")) return;
  const run = /^[1-9]$/.test(event.key) ? () => pick(Number(event.key) - 1) : keys[event.key];
  if (!run) return;
  event.preventDefault();
  run();
});

$("tie").addEventListener("click", keys["="]);
$("skip").addEventListener("click", keys.s);
$("flag").addEventListener("click", keys.f);
$("undo").addEventListener("click", keys.u);
$("submit").addEventListener("click", submit);
$("help-button").addEventListener("click", keys["?"]);
$("grades").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) setGrade(Number(button.dataset.grade));
});
$("leave").addEventListener("click", async () => {
  await ask("leave");
  location.assign("/");
});

document.addEventListener("click", (event) => {
  if (event.detail) event.target.closest("button")?.blur(); // Enter after a click is not meant for the button
});

act("next", {}, "");
