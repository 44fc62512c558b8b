// Buttons that copy code, columns of text that begin at the left, and figures that open at their
// full size. Pages work without this file.
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

  // Begins with a number, and has at most a unit besides: "6.46 MB", "10 of 97", "(1, 49, 128)".
  const isNumber = (text) =>
    /^[^a-z]*\d/i.test(text) && text.replace(/[^a-z]/gi, "").length <= 6;

  // A column of text begins at the left, as do the names of rows. Columns are counted from the
  // right, because a name that several rows share is missing in all rows but the first.
  const align = (table) => {
    const columns = [];
    for (const row of table.rows) {
      let place = 0;
      for (const cell of [...row.cells].reverse()) {
        (columns[place] ??= []).push(cell);
        place += cell.colSpan;
      }
    }
    for (const column of columns.filter(Boolean)) {
      const body = column.filter((cell) => cell.closest("tbody"));
      const texts = body.map((cell) => cell.textContent.trim()).filter((text) => /\w/.test(text));
      const isText = 2 * texts.filter(isNumber).length < texts.length;
      const isName = body.some((cell) => cell.tagName === "TH");
      const longest = Math.max(...texts.map((text) => text.length));
      for (const cell of column) {
        cell.classList.toggle("text", isText || isName);
        cell.classList.toggle("long", longest > 24);
        cell.classList.toggle("short", longest <= (isText ? 16 : 24));
      }
    }
  };

  // On a narrow screen: figures whose text can still be read when they are made to fit.
  const fit = () => {
    for (const figure of document.querySelectorAll(".cell_output img")) {
      const room = figure.closest(".cell_output").clientWidth;
      figure.classList.toggle("fits", figure.naturalWidth < 1.6 * room);
    }
  };

  const start = () => {
    for (const table of document.querySelectorAll(".cell_output table, .table-wrapper table")) {
      align(table);
    }
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
  window.addEventListener("load", fit);
  window.addEventListener("resize", fit);
})();
