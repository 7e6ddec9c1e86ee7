"""Networks: how they are loaded, called, adapted and saved."""
