// Shared by the page of a film and the page of a running stream: the table of blocks.
// Of each block: data.blocks [start, end] in seconds, data.held what each slot of the cache holds,
// data.strips the pictures of its passes, data.made (running stream only) the time it took.
// data.prompts: the [second, text] of each prompt.
const ROWS = 12, get = id => document.getElementById(id), film = get("film");
let current = -1;  // the block that plays

function drawCache() {  // the rows around the block that plays
  const table = document.querySelector("table"), last = data.blocks.length;
  const first = Math.max(0, Math.min(current - ROWS / 2, last - ROWS));
  const passes = data.strips.some(strip => strip);
  table.innerHTML = "<tr class=head><td>" + (data.made ? "<td>made in" : "") +
    (passes ? "<td>noise \u2192 clean" : "") + "<td>pinned<td colspan=999>ring";
  for (let k = first; k < Math.min(first + ROWS, last); k++) {
    const words = data.prompts.slice(1).find(([t]) => t == data.blocks[k][0])?.[1];
    if (words) {
      const cell = table.insertRow().insertCell();
      [cell.className, cell.colSpan] = ["prompt", 999];
      cell.textContent = cell.title = words;
    }
    const row = table.insertRow(), [low, high] = data.blocks[k];
    row.className = k == current ? "now" : k > current ? "later" : "";
    const when = low < high ? `${low}\u2013${high} s` : "first frame";
    row.insertCell().textContent = `block ${k}, ${when}`;
    if (data.made) row.insertCell().textContent = data.made[k];
    if (passes) row.insertCell().appendChild(new Image()).src = data.strips[k];
    const held = data.held[k], before = data.held[k - 1] ?? [];
    for (let slot = 0; slot < Math.max(held.length, before.length); slot++) {
      const cell = row.insertCell(), block = held[slot] ?? "", gone = before[slot] ?? "";
      if (block === k) cell.className = "own";
      if (gone !== "" && gone !== block) cell.appendChild(document.createElement("s")).append(gone);
      cell.append(block);
    }
  }
}

function followFilm(moved) {  // mark the block that plays, and call `moved` at every picture
  const found = data.blocks.findIndex(([low, high]) => film.currentTime < high);
  const block = found < 0 ? data.blocks.length - 1 : found;
  if (block != current) { current = block; drawCache(); }
  moved();
  requestAnimationFrame(() => followFilm(moved));
}
