(() => {
  "use strict";
  const table = document.getElementById("board"), body = table.tBodies[0], rows = [...body.rows];
  const heads = [...table.tHead.rows[0].cells], by = (id) => document.getElementById(id);
  const value = (row, column, kind) => {
    const text = row.cells[column].dataset.value;
    return kind === "text" ? text.toLowerCase() : text === "" || text === "nan" ? null : Number(text);
  };
  // what has no value stands last, whichever way the others are sorted; equal rows keep their first order
  const compare = (column, kind, sign) => (one, other) => {
    const [a, b] = [value(one, column, kind), value(other, column, kind)];
    if (a === null || b === null) return (a === null) - (b === null) || rows.indexOf(one) - rows.indexOf(other);
    const order = kind === "text" ? a.localeCompare(b) : a - b;
    return sign * order || rows.indexOf(one) - rows.indexOf(other);
  };
  heads.forEach((head, column) => {
    const kind = head.dataset.sort, target = head.querySelector(".head") || head, button = document.createElement("button");
    button.type = "button";
    button.append(...target.childNodes);
    target.append(button);
    button.addEventListener("click", () => {
      const first = kind === "text" ? "ascending" : "descending";
      const next = head.getAttribute("aria-sort") === first ? (first === "ascending" ? "descending" : "ascending") : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      body.append(...[...rows].sort(compare(column, kind, next === "ascending" ? 1 : -1)));
    });
  });
  const filter = () => {
    const wanted = by("find").value.trim().toLowerCase(), kind = by("kind").value, asked = by("asked").value;
    let shown = 0;
    for (const row of rows) {
      const fits = row.cells[0].dataset.value.toLowerCase().includes(wanted) && (!kind || row.dataset.kind === kind) &&
        (!asked || row.dataset.asked === asked) && (!by("measured").checked || row.dataset.measured === "1");
      row.hidden = !fits;
      shown += fits;
    }
    // a column in which no shown row is scored is not shown either
    heads.forEach((head, column) => {
      if (!head.classList.contains("score")) return;
      const empty = shown > 0 && rows.every((row) => row.hidden || row.cells[column].classList.contains("none"));
      for (const row of [head.parentElement, ...rows]) row.cells[column].hidden = empty;
    });
    by("count").textContent = shown === rows.length ? `${shown} models` : `${shown} of ${rows.length} models`;
  };
  by("controls").hidden = false;
  by("controls").addEventListener("submit", (event) => event.preventDefault());
  by("controls").addEventListener("input", filter);
  filter();
})();
