"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);

  // ------------------------------------------------------------------------------------------- small helpers

  // All text of prompts goes through textContent: none of it is ever read as markup.
  function make(tag, options = {}, ...children) {
    const node = Object.assign(document.createElement(tag), options);
    node.append(...children.filter((child) => child != null));
    return node;
  }

  function imageOf(source, alt) {
    const image = make("img", { src: source, alt, decoding: "async" });
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 192));
    return image;
  }

  const show = (value, name) => value.toFixed(data.columns[name].decimals);
  const label = (row) => `${row.prompt ?? row.id}`;

  // ------------------------------------------------------------------------------------------- rows

  function chips(row) {
    const list = make("ul", { className: "chips" });
    const add = (name, value, kind = "") => list.append(make("li", { className: kind }, `${name} `, make("b", {}, value)));
    add("id", data.several ? `${row.id}, sample ${row.sample}` : row.id);
    for (const name of Object.keys(data.columns)) {
      const value = row.scores[name], base = row.scores[`${name}_reference`];
      if (value === undefined) continue;
      add(data.columns[name].title, base === undefined ? show(value, name) : `${show(base, name)} → ${show(value, name)}`);
    }
    if (row.problem) add("problem", row.problem, "problem");
    return list;
  }

  function frame(row, source, name, link) {
    const open = make("button", { className: "frame", type: "button", title: "Compare" }, imageOf(source, `${name}: ${label(row)}`));
    open.addEventListener("click", () => view(row));
    return make("figure", {}, open, make("figcaption", {}, name, link && make("a", { href: link, target: "_blank", rel: "noopener" }, "file")));
  }

  function difference(row) {
    const image = imageOf(row.difference, `difference: ${label(row)}`);
    const gain = make("input", { type: "range", min: data.gain, max: 16, step: 1, value: 4, ariaLabel: "How much the difference is amplified" });
    const words = make("span");
    const amplify = () => {
      image.style.filter = `brightness(${gain.value / data.gain})`;
      words.textContent = `difference ×${gain.value}`;
    };
    gain.addEventListener("input", amplify);
    amplify();
    return make("figure", { className: "wide" }, make("span", { className: "frame" }, image), make("figcaption", {}, words, gain));
  }

  function card(row) {
    const trio = make("div", { className: "trio" });
    if (row.reference) trio.append(frame(row, row.reference, data.names.reference, row.reference_file));
    trio.append(frame(row, row.image, data.names.image, row.file));
    if (row.difference) trio.append(difference(row));
    return make("li", {}, make("p", { className: "prompt" }, label(row)), chips(row), trio);
  }

  // Each row's card is made once and then only moved.
  const cards = new Map();
  const cardOf = (row) => cards.get(row) ?? cards.set(row, card(row)).get(row);

  // ------------------------------------------------------------------------------------------- sorting and filters

  const filters = { all: ["all", () => true] };
  for (const [name, one] of Object.entries(data.columns)) {
    if (!one.of) continue;
    filters[`${one.of} lower`] = [`${data.columns[one.of].title} below ${data.names.reference}`, (row) => gap(row, one.of) < 0];
    filters[`${one.of} higher`] = [`${data.columns[one.of].title} above ${data.names.reference}`, (row) => gap(row, one.of) > 0];
  }
  if (data.rows.some((row) => row.problem)) filters.problem = ["with a problem", (row) => Boolean(row.problem)];

  const gap = (row, name) => row.scores[name] - row.scores[`${name}_reference`];

  function value(row, name) {
    const of = data.columns[name].of;
    return of ? gap(row, of) : row.scores[name];
  }

  function ordered(rows) {
    const name = find("sort").value, order = find("order").value;
    if (!name || order === "number") return rows.slice().sort((a, b) => a.number - b.number);
    const direction = (data.columns[name].higher ? 1 : -1) * (order === "worst" ? 1 : -1);
    const known = rows.filter((row) => Number.isFinite(value(row, name)));
    const unknown = rows.filter((row) => !Number.isFinite(value(row, name)));
    return [...known.sort((a, b) => direction * (value(a, name) - value(b, name)) || a.number - b.number), ...unknown];
  }

  function refresh() {
    const words = find("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = filters[find("show").value][1], name = find("sort").value;
    const rows = ordered(data.rows).filter((row) => fits(row) && words.every((word) => label(row).toLowerCase().includes(word)));
    find("rows").replaceChildren(...rows.map(cardOf));
    find("nothing").hidden = rows.length > 0;
    const all = data.rows.length === data.total ? "" : ` (${data.total} scored)`;
    find("count").textContent = `${rows.length} of ${data.rows.length}${all}`;
    histogram(name);
  }

  function histogram(name) {
    const values = (data.values[name] ?? []).filter(Number.isFinite), figure = find("spread"), bins = 40;
    const low = Math.min(...values), high = Math.max(...values);
    figure.hidden = values.length < 8 || !(high > low);
    if (figure.hidden) return;
    const counts = new Array(bins).fill(0);
    for (const one of values) counts[Math.min(bins - 1, Math.floor(((one - low) / (high - low)) * bins))] += 1;
    const most = Math.max(...counts), svg = figure.querySelector("svg");
    svg.setAttribute("aria-label", `${data.columns[name].title} of ${values.length} images`);
    svg.replaceChildren(...counts.map((count, k) => bar(k * (600 / bins), 60 * (count / most), 600 / bins - 1.5)));
    const ends = [low, high].map((end) => make("span", {}, show(end, name)));
    figure.querySelector("figcaption").replaceChildren(ends[0], make("span", {}, `${data.columns[name].title}, ${values.length} images`), ends[1]);
  }

  function bar(x, height, width) {
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, one] of Object.entries({ x, y: 64 - height, width, height })) rect.setAttribute(name, one);
    return rect;
  }

  function setUpTools() {
    const sortable = Object.entries(data.columns).filter(([name]) => data.values[name]);
    find("sort").append(...sortable.map(([name, one]) => make("option", { value: name }, one.title)));
    if (data.sort) find("sort").value = data.sort;
    find("show").append(...Object.entries(filters).map(([key, [words]]) => make("option", { value: key }, words)));
    if (!sortable.length) find("sort").closest("label").hidden = find("order").closest("label").hidden = true;
    for (const id of ["sort", "order", "show"]) find(id).addEventListener("change", refresh);
    find("text").addEventListener("input", refresh);
    refresh();
  }

  // ------------------------------------------------------------------------------------------- viewer with a wipe

  function view(row) {
    const viewer = find("viewer"), stage = viewer.querySelector(".stage"), pair = Boolean(row.reference);
    const [under, over] = [stage.querySelector(".under"), stage.querySelector(".over")];
    under.src = row.image;
    over.src = row.reference ?? row.image;
    for (const image of [under, over]) image.onload = () => {
      image.classList.toggle("small", image.naturalWidth <= 192);
      viewer.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
    };
    stage.querySelector(".left").textContent = pair ? data.names.reference : "";
    stage.querySelector(".right").textContent = data.names.image;
    viewer.querySelector(".prompt").textContent = label(row);
    viewer.querySelector(".wipe").hidden = !pair;
    wipe(pair ? 50 : 0);
    viewer.showModal();
  }

  function wipe(percent) {
    const viewer = find("viewer");
    viewer.querySelector(".wipe").value = percent;
    viewer.querySelector(".stage").style.setProperty("--cut", `${percent}%`);
  }

  function setUpViewer() {
    const viewer = find("viewer"), stage = viewer.querySelector(".stage"), slider = viewer.querySelector(".wipe");
    slider.addEventListener("input", () => wipe(slider.value));
    stage.addEventListener("pointermove", (event) => {
      const box = stage.getBoundingClientRect();
      if (!slider.hidden) wipe(Math.max(0, Math.min(100, (100 * (event.clientX - box.left)) / box.width)));
    });
    viewer.querySelector(".close").addEventListener("click", () => viewer.close());
    viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  }

  // ------------------------------------------------------------------------------------------- blind vote

  // Only random pairs: the worst ones alone would bias the vote.
  const pairs = data.rows.filter((row) => row.reference && row.sampled);
  const storage = `vqdm-image-votes-${data.key}`;
  let poll = null, since = 0;

  // A poll: the order of the pairs, which side the scored image is on, and a vote for each pair so far.
  function fresh() {
    const order = pairs.map((_, k) => k);
    for (let k = order.length - 1; k > 0; k--) {
      const other = Math.floor(random() * (k + 1));
      [order[k], order[other]] = [order[other], order[k]];
    }
    return { order, swapped: order.map(() => random() < 0.5), votes: [] };
  }

  const random = () => crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32;

  function stored() {
    try {
      const found = JSON.parse(localStorage.getItem(storage));
      return found && found.order.length === pairs.length ? found : null;
    } catch { return null; }
  }

  function keep() {
    try { localStorage.setItem(storage, JSON.stringify(poll)); } catch { /* a page without storage still votes */ }
  }

  function openBallot() {
    poll = stored() ?? fresh();
    find("ballot").showModal();
    poll.votes.length < pairs.length ? ask() : tally();
  }

  function current() {
    const k = poll.votes.length, row = pairs[poll.order[k]];
    return { row, swapped: poll.swapped[k] };
  }

  function ask() {
    find("booth").hidden = false;
    find("tally").hidden = true;
    const { row, swapped } = current(), booth = find("booth");
    booth.querySelector(".prompt").textContent = label(row);
    const sources = swapped ? [row.image, row.reference] : [row.reference, row.image];
    booth.querySelectorAll(".side").forEach((side, k) => {
      const image = imageOf(sources[k], `${side.dataset.choice} image`);
      side.querySelector("img").replaceWith(image);
    });
    Object.assign(booth.querySelector("progress"), { max: pairs.length, value: poll.votes.length });
    find("place").textContent = `${poll.votes.length + 1} of ${pairs.length}`;
    find("undo").disabled = poll.votes.length === 0;
    // No side may look chosen before it is.
    booth.focus();
    since = Date.now();
  }

  function vote(choice) {
    const { row, swapped } = current();
    const side = { left: swapped, right: !swapped }[choice];
    const preferred = choice === "tie" ? "tie" : side ? "image" : "reference";
    poll.votes.push({ id: row.id, sample: row.sample, prompt: row.prompt, choice, preferred,
      left: swapped ? "image" : "reference", right: swapped ? "reference" : "image",
      seconds: (Date.now() - since) / 1000, at: new Date().toISOString() });
    keep();
    poll.votes.length < pairs.length ? ask() : tally();
  }

  function undo() {
    if (!poll.votes.length) return;
    poll.votes.pop();
    keep();
    ask();
  }

  // Wilson's interval for the share k/n; a tie is half a vote for each side.
  function wilson(k, n, z = 1.959964) {
    const p = k / n, middle = (p + z ** 2 / (2 * n)) / (1 + z ** 2 / n);
    const half = (z / (1 + z ** 2 / n)) * Math.sqrt((p * (1 - p)) / n + z ** 2 / (4 * n ** 2));
    return [Math.max(0, middle - half), Math.min(1, middle + half)];
  }

  function counts() {
    const of = (kind) => poll.votes.filter((one) => one.preferred === kind).length;
    return { image: of("image"), reference: of("reference"), tie: of("tie"), n: poll.votes.length };
  }

  const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;

  function tally() {
    find("booth").hidden = true;
    find("tally").hidden = false;
    const { image: ours, reference: theirs, tie, n } = counts(), body = find("tally").querySelector("tbody");
    const share = (ours + tie / 2) / n, [low, high] = n ? wilson(ours + tie / 2, n) : [0, 1];
    find("verdict").textContent = !n ? "No vote yet." : `The ${data.names.image} images are preferred in ${percent(share)} of ${n} votes, ` +
      `95\u00a0% interval ${percent(low)} to ${percent(high)}. ` +
      (low > 0.5 || high < 0.5 ? "The interval excludes 50 %." : "The interval includes 50 %: no difference is shown.");
    const lines = [[`${data.names.image} better`, ours], [`${data.names.reference} better`, theirs], ["no difference", tie]];
    body.replaceChildren(...lines.map(([name, count]) => make("tr", {}, make("th", {}, name), make("td", {}, String(count)))));
    find("tally").querySelector(".bar").replaceChildren(...(n ? marks(share, low, high) : []));
    find("more").hidden = n === pairs.length;
    find("export").disabled = !n;
  }

  function marks(share, low, high) {
    const range = make("i"), point = make("b");
    Object.assign(range.style, { left: `${100 * low}%`, width: `${100 * (high - low)}%` });
    point.style.left = `${100 * share}%`;
    return [range, point];
  }

  // Quoted always; a cell that a spreadsheet would take for a formula gets an apostrophe.
  function cell(value) {
    const text = String(value ?? "");
    return `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  }

  function exported() {
    const names = ["number", "id", "sample", "prompt", "left", "right", "choice", "preferred", "seconds", "at"];
    const sides = { image: data.names.image, reference: data.names.reference, tie: "tie" };
    const lines = poll.votes.map((one, k) => ({ ...one, number: k + 1, left: sides[one.left], right: sides[one.right], preferred: sides[one.preferred] }));
    return [names.join(","), ...lines.map((one) => names.map((name) => cell(one[name])).join(","))].join("\r\n") + "\r\n";
  }

  function save() {
    const link = make("a", { href: URL.createObjectURL(new Blob([exported()], { type: "text/csv" })), download: "votes.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function onKey(event) {
    if (find("booth").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
    const action = { ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowDown: () => vote("tie"), Backspace: undo }[event.key];
    if (!action || event.repeat) return;
    event.preventDefault();
    action();
  }

  function setUpBallot() {
    find("vote").hidden = pairs.length === 0;
    find("vote").addEventListener("click", openBallot);
    const ballot = find("ballot");
    ballot.addEventListener("keydown", onKey);
    ballot.addEventListener("cancel", (event) => {
      if (find("booth").hidden) return;
      event.preventDefault();
      tally();
    });
    ballot.querySelectorAll("[data-choice]").forEach((one) => one.addEventListener("click", () => vote(one.dataset.choice)));
    const actions = { undo, finish: tally, export: save, more: ask, leave: () => ballot.close() };
    actions.again = () => { poll = fresh(); keep(); ask(); };
    for (const [id, action] of Object.entries(actions)) find(id).addEventListener("click", action);
  }

  setUpTools();
  setUpViewer();
  setUpBallot();
})();
