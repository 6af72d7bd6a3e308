// Light or dark before anything is drawn: as the system says, or as the reader chose.

const THEMES = ["auto", "light", "dark"];
const root = document.documentElement;
root.dataset.theme = THEMES.find((name) => name === localStorage.getItem("dllm.theme")) ?? "auto";

addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme");
  const tell = () => {
    const { theme } = root.dataset;
    button.textContent = `◐ ${theme[0].toUpperCase()}${theme.slice(1)}`;
    button.setAttribute("aria-label", `Theme: ${theme}`);
  };
  button.addEventListener("click", () => {
    root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
    localStorage.setItem("dllm.theme", root.dataset.theme);
    tell();
  });
  tell();
});
