/* The system's theme until the reader chooses another. */
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "system";
  const show = () => {
    root.dataset.theme = chosen === "system" ? (system.matches ? "dark" : "light") : chosen;
    const label = document.querySelector("#theme span");
    if (label) label.textContent = chosen;
  };
  try { chosen = localStorage.getItem("paroattn-theme") || "system"; } catch { /* no storage for this file */ }
  system.addEventListener("change", show);
  show();
  addEventListener("DOMContentLoaded", () => {
    show();
    document.getElementById("theme").addEventListener("click", () => {
      chosen = { system: "light", light: "dark", dark: "system" }[chosen] || "system";
      try { localStorage.setItem("paroattn-theme", chosen); } catch { /* kept for this view only */ }
      show();
    });
  });
})();
