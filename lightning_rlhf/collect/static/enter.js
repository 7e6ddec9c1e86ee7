// Says who one is. A link may carry the token behind its #, which browsers do not send.
"use strict";

const form = document.getElementById("enter");
const shared = new URLSearchParams(location.hash.slice(1)).get("token");
if (shared && form.elements.token) {
  form.elements.token.value = shared;
  history.replaceState(null, "", location.pathname);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const error = document.getElementById("error");
  error.textContent = "";
  try {
    const response = await fetch("/api/enter", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(Object.fromEntries(new FormData(form))),
    });
    if (response.ok) location.assign("/");
    else error.textContent = (await response.json()).error;
  } catch {
    error.textContent = "The server does not answer.";
  }
});
