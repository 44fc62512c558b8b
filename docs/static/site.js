// Buttons that copy code, and figures that open at their full size. Pages work without this file.
(() => {
  // The commands of a session in a terminal, without what they printed; all other code as it is.
  const copied = (text) => {
    const commands = text.split("\n").filter((line) => line.startsWith("$ "));
    return commands.length ? commands.map((line) => line.slice(2)).join("\n") : text.trimEnd();
  };

  // Browsers have navigator.clipboard only for pages that come safely.
  const copy = async (text) => {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  };

  const start = () => {
    for (const code of document.querySelectorAll("article div.highlight")) {
      const pre = code.querySelector("pre");
      if (!pre || code.closest(".cell_output")) continue;
      const button = document.createElement("button");
      button.className = "copy";
      button.type = "button";
      button.textContent = "copy";
      button.addEventListener("click", async () => {
        await copy(copied(pre.textContent));
        button.textContent = "copied";
        setTimeout(() => (button.textContent = "copy"), 1500);
      });
      code.append(button);
    }
    for (const figure of document.querySelectorAll(".cell_output img")) {
      figure.addEventListener("click", () => {
        if (!figure.src.startsWith("data:")) window.open(figure.src);
      });
    }
  };
  document.addEventListener("DOMContentLoaded", start);
})();
