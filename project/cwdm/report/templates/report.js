"use strict";
// The table sorts by the column whose heading is pressed, the other way round when it is pressed again.
(() => {
  const table = document.getElementById("overview");
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const order = document.getElementById("order");
  const value = (row, column) => {
    const cell = row.cells[column];
    const told = cell.dataset.value;
    if (told === undefined) return cell.textContent.trim();
    return told === "" ? null : told === "inf" ? Infinity : Number(told);
  };
  const compare = (a, b) => (typeof a === "number" ? (a > b) - (a < b) : a.localeCompare(b, "en", { numeric: true }));
  const sort = (column, direction) => {
    headings.forEach((heading) => heading.removeAttribute("aria-sort"));
    headings[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    order.value = `${column},${direction}`;
    const keyed = [...body.rows].map((row) => [value(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is not known stands last
      return direction * compare(a, b);
    });
    body.append(...keyed.map(([, row]) => row));
  };
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => sort(column, heading.getAttribute("aria-sort") === "ascending" ? -1 : 1));
    order.add(new Option(`${button.textContent} ↑`, `${column},1`));
    order.add(new Option(`${button.textContent} ↓`, `${column},-1`));
  });
  order.addEventListener("change", () => sort(...order.value.split(",").map(Number)));
})();

// Rows and sections that do not fit what is sought are hidden.
(() => {
  const rows = [...document.querySelectorAll("#overview tbody tr")];
  const text = new Map(rows.map((row) => [row, `${row.textContent} ${row.querySelector(".more")?.title ?? ""}`.toLowerCase()]));
  const tally = [...document.querySelectorAll("#tools [data-verdict]")];
  const search = document.getElementById("search");
  const modality = document.getElementById("modality");
  const show = () => {
    const verdicts = tally.filter((button) => button.ariaPressed === "true").map((button) => button.dataset.verdict);
    const sought = search.value.toLowerCase().split(/\s+/);
    let count = 0;
    for (const row of rows) {
      const fits =
        (!verdicts.length || verdicts.includes(row.dataset.verdict)) &&
        (!modality?.value || modality.value === row.dataset.modality) &&
        sought.every((word) => text.get(row).includes(word));
      row.hidden = !fits;
      count += fits;
      const section = row.dataset.section && document.getElementById(row.dataset.section);
      if (section) section.hidden = !fits;
    }
    document.getElementById("found").value = count < rows.length ? `${count} of ${rows.length}` : "";
  };
  for (const button of tally) {
    button.addEventListener("click", () => {
      button.ariaPressed = String(button.ariaPressed !== "true");
      show();
    });
  }
  search.addEventListener("input", show);
  modality?.addEventListener("change", show);
  document.getElementById("tools").addEventListener("submit", (event) => event.preventDefault());
  show(); // a browser may have kept what was typed
})();

// The outlines can be taken away: they cover the border that they show.
(() => {
  const outlines = document.getElementById("outlines");
  outlines.parentElement.hidden = !document.querySelector(".outline");
  const show = () => document.body.classList.toggle("without-outlines", !outlines.checked);
  outlines.addEventListener("change", show);
  show();
})();

// A slice that is pressed fills the window; the arrow keys lead to the other images and planes of the case.
(() => {
  const dialog = document.getElementById("enlarged");
  const picture = dialog.querySelector(".picture");
  let shown = null;
  const enlarge = (tile) => {
    shown = tile;
    const image = tile.querySelector("img");
    const copy = document.createElement("div");
    copy.className = "tile";
    Object.assign(copy.dataset, tile.dataset);
    copy.append(...[...tile.children].map((child) => child.cloneNode(true)));
    picture.style.setProperty("--ratio", image.getAttribute("width") / image.getAttribute("height"));
    picture.replaceChildren(copy);
    dialog.querySelector(".caption").textContent = image.alt;
    if (!dialog.open) dialog.showModal();
  };
  const move = (planes, images) => {
    const views = shown.closest(".views");
    const tiles = [...views.querySelectorAll(".tile")];
    const count = views.querySelectorAll(".label").length;
    const index = tiles.indexOf(shown);
    const [plane, image] = [Math.floor(index / count) + planes, (index % count) + images];
    const all = tiles.length / count;
    enlarge(tiles[((plane + all) % all) * count + ((image + count) % count)]);
  };
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  document.addEventListener("click", (event) => {
    const tile = event.target.closest(".views .tile");
    if (tile) enlarge(tile);
  });
  dialog.addEventListener("keydown", (event) => {
    if (!steps[event.key]) return;
    event.preventDefault();
    move(...steps[event.key]);
  });
  dialog.querySelector(".previous").addEventListener("click", () => move(0, -1));
  dialog.querySelector(".next").addEventListener("click", () => move(0, 1));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest(".close, .picture")) dialog.close();
  });
})();
