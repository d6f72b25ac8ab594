"use strict";
// Sorting, filtering and hiding of the table that the page already shows. Without this script the page is whole.
(() => {
  const table = document.getElementById("board");
  const body = document.getElementById("models");
  const controls = document.getElementById("controls");
  const headings = [...table.tHead.rows[1].cells];
  const count = document.getElementById("count");
  const field = (id) => document.getElementById(id);

  const value = (cell) => {
    if (cell.tagName === "TH") return cell.querySelector("a").textContent;
    return "v" in cell.dataset ? Number(cell.dataset.v) : null;
  };
  const rows = [...body.rows].map((row, place) => ({
    row, place,
    values: [...row.cells].map(value),
    text: row.textContent.toLowerCase(),
    verdict: row.dataset.verdict,
    kind: row.dataset.kind,
    bits: "bits" in row.dataset ? Number(row.dataset.bits) : null,
  }));
  const failures = [...table.querySelectorAll(".failed")].map((row) => ({ row, text: row.textContent.toLowerCase() }));

  // what has no value stays last in both directions; equal values keep the order of the page
  const names = new Intl.Collator("en", { numeric: true }).compare; // int2 before int10
  const compare = (column, sign) => (a, b) => {
    const x = a.values[column], y = b.values[column];
    if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
    return sign * (typeof x === "string" ? names(x, y) : x - y) || a.place - b.place;
  };

  const sort = (column) => {
    const heading = headings[column];
    const now = heading.getAttribute("aria-sort");
    const next = now ? (now === "ascending" ? "descending" : "ascending") : heading.dataset.first;
    for (const other of headings) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", next);
    rows.sort(compare(column, next === "ascending" ? 1 : -1));
    body.append(...rows.map((it) => it.row));
  };

  const filter = () => {
    const text = field("find").value.trim().toLowerCase(), verdict = field("verdict").value, kind = field("kind").value;
    const most = field("bits").value === "" ? Infinity : Number(field("bits").value);
    let shown = 0;
    for (const it of rows) {
      const fits = it.text.includes(text) && (!verdict || it.verdict === verdict) && (!kind || it.kind === kind)
        && (most === Infinity || (it.bits !== null && it.bits <= most));
      it.row.hidden = !fits;
      shown += fits;
    }
    for (const it of failures) it.row.hidden = !it.text.includes(text) || verdict !== "" || kind !== "" || most !== Infinity;
    count.textContent = `${shown} of ${rows.length} models`;
  };

  const fold = (box) => table.classList.toggle(`without-${box.dataset.group}`, !box.checked);
  const boxes = [...controls.querySelectorAll("[data-group]")];

  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(column));
    if (heading.dataset.sorted) heading.setAttribute("aria-sort", heading.dataset.sorted);
  });
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", (event) => ("group" in event.target.dataset ? fold(event.target) : filter()));
  controls.addEventListener("reset", () => setTimeout(() => { boxes.forEach(fold); filter(); }));
  boxes.forEach(fold);
  filter();
  controls.hidden = false;
})();
