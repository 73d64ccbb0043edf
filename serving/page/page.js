"use strict";
// The page of a server: asks /v1/recommend whenever something changes, and draws what every member added to each score.
// No library, nothing from the network but this server; all text goes in as text, never as HTML.

const COLOURS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map((number) => `var(--m${number})`);
const PAUSE_MS = 150; // between the last change and the question

const state = { about: null, liked: new Set(), known: new Map(), pictures: new Map(), question: 0, token: "" };
const at = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "colour") element.style.setProperty("--colour", value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

async function call(path, body) {
  const headers = state.token ? { authorization: `Bearer ${state.token}` } : {};
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  const reply = await fetch(path, options);
  if (reply.status === 401) at("token-box").hidden = false;
  if (reply.ok) return reply;
  const text = await reply.json().catch(() => ({ error: `the server answered ${reply.status}` }));
  throw new Error(text.error);
}

/** A path about the model that is shown. */
function ofModel(path, query = []) {
  const name = at("name").value || new URLSearchParams(location.hash.slice(1)).get("model");
  return `${path}?${new URLSearchParams(name ? [["model", name], ...query] : query)}`;
}

async function about() {
  try {
    state.about = await (await call(ofModel("v1/catalogue"))).json();
  } catch (error) {
    at("model").textContent = "not connected";
    at("said").textContent = error.message;
    return;
  }
  at("token-box").hidden = true;
  const { models, model, version, items, user_count: users, members, profiles, k_max: most, figures } = state.about;
  at("model").textContent = `${model}, version ${version} · ${items.toLocaleString()} items · ${users.toLocaleString()} users`;
  at("name").replaceChildren(...models.map((name) => make("option", { value: name, textContent: name })));
  at("name").value = model;
  at("name-box").hidden = models.length < 2;
  document.title = `Recommendations of ${model}`;
  at("users").replaceChildren(...state.about.users.map((user) => make("option", { value: user })));
  at("profile").replaceChildren(...profiles.map((name) => make("option", { value: name, textContent: name })));
  at("profile").disabled = profiles.length < 2;
  at("k").max = most;
  at("k").value = Math.min(at("k").value, most);
  at("diversity-box").hidden = !state.about.diversity;
  at("weights-box").hidden = members.length < 2;
  at("weights").replaceChildren(...members.map(slider));
  at("filters").replaceChildren(...Object.entries(state.about.filters).map(filter));
  const rows = Object.entries(figures).map(([name, value]) =>
    make("tr", {}, make("td", { textContent: name }), make("td", { textContent: Number(value.toPrecision(4)) })));
  at("figures").replaceChildren(...rows);
  at("figures-box").hidden = !rows.length;
  at("report").hidden = !state.about.report || Boolean(state.token); // a link carries no token
  at("report").href = ofModel("v1/report");
  recall();
  likes();
}

function slider(name, place) {
  const id = `weight-${place}`;
  const value = make("output", { textContent: "1" });
  value.htmlFor = id;
  const input = make("input", { id, type: "range", min: 0, max: 3, step: 0.1, value: 1 });
  input.dataset.member = name;
  input.addEventListener("input", () => (value.textContent = input.value));
  const swatch = make("span", { className: "swatch", colour: COLOURS[place % COLOURS.length] });
  return make("div", { className: "pair" }, make("label", { htmlFor: id, title: name }, swatch, name), input, value);
}

function filter([column, values], place) {
  const boxes = values.map((value, number) => {
    const box = make("input", { type: "checkbox", id: `filter-${place}-${number}`, value });
    box.dataset.column = column;
    return make("label", { htmlFor: box.id }, box, value);
  });
  const list = make("div", { className: "values", role: "group", "aria-label": column }, ...boxes);
  return make("details", {}, make("summary", { textContent: column }), list);
}

function question() {
  const weights = {};
  for (const input of at("weights").querySelectorAll("input"))
    if (Number(input.value) !== 1) weights[input.dataset.member] = Number(input.value);
  const filters = {};
  for (const box of at("filters").querySelectorAll("input:checked"))
    (filters[box.dataset.column] ??= []).push(box.value);
  return {
    model: state.about.model,
    user_id: at("user").value.trim(),
    history: [...state.liked],
    k: Math.min(Math.max(Math.round(Number(at("k").value)) || 1, 1), state.about.k_max),
    profile: at("profile").value,
    diversity: Number(at("diversity").value),
    filters,
    // The student of the fast profile is one model: it has no members to weigh.
    weights: at("profile").value === "best" ? weights : {},
  };
}

/** The address holds everything that was chosen, so that a link shows the same list; never the token. */
function remember(asked) {
  const parts = new URLSearchParams();
  if (state.about.models.length > 1) parts.append("model", asked.model);
  if (asked.user_id) parts.append("user", asked.user_id);
  for (const item of asked.history) parts.append("liked", item);
  if (asked.k !== 10) parts.append("k", asked.k);
  if (asked.diversity) parts.append("diversity", asked.diversity);
  if (asked.profile !== state.about.profiles[0]) parts.append("profile", asked.profile);
  for (const [column, values] of Object.entries(asked.filters)) for (const one of values) parts.append(`filter-${column}`, one);
  for (const [member, factor] of Object.entries(asked.weights)) parts.append(`weight-${member}`, factor);
  history.replaceState(null, "", `#${parts}`);
}

/** Puts what the address says into the form, once it is known what there is to choose. */
function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  at("user").value = parts.get("user") || "";
  for (const item of parts.getAll("liked")) state.liked.add(item);
  for (const name of ["k", "diversity"]) if (parts.has(name)) at(name).value = parts.get(name);
  if (state.about.profiles.includes(parts.get("profile"))) at("profile").value = parts.get("profile");
  at("diversity-value").textContent = at("diversity").value;
  for (const input of at("weights").querySelectorAll("input")) {
    input.value = parts.get(`weight-${input.dataset.member}`) ?? 1;
    input.dispatchEvent(new Event("input"));
  }
  for (const box of at("filters").querySelectorAll("input")) {
    box.checked = parts.getAll(`filter-${box.dataset.column}`).includes(box.value);
    if (box.checked) box.closest("details").open = true;
  }
}

async function recommend() {
  if (!state.about) return about();
  const own = ++state.question;
  at("list").classList.add("waiting");
  const started = performance.now();
  try {
    const asked = question();
    remember(asked);
    const answer = await (await call("v1/recommend", asked)).json();
    if (own === state.question) show(answer, performance.now() - started);
  } catch (error) {
    if (own === state.question) fail(error);
  }
}

function fail(error) {
  at("list").classList.remove("waiting");
  at("list").replaceChildren();
  at("legend").replaceChildren();
  at("fallback").hidden = true;
  at("said").textContent = error.message;
}

function show(answer, milliseconds) {
  const members = answer.members_used;
  const colour = (name) => COLOURS[Math.max(state.about.members.indexOf(name), 0) % COLOURS.length];
  const who = answer.unknown_user ? " · for somebody unknown" : "";
  const count = answer.items.length === 1 ? "1 item" : `${answer.items.length} items`;
  at("said").textContent = `${count} in ${Math.round(milliseconds)} ms · version ${answer.version}${who}`;
  at("fallback").textContent = answer.fallback;
  at("fallback").hidden = !answer.fallback;
  at("legend").replaceChildren(...members.map((name) =>
    make("li", {}, make("span", { className: "swatch", colour: colour(name) }), name)));
  const shares = answer.items.map((item) => members.map((name) => [name, item.contributions[name]]));
  const scale = {
    below: Math.max(0, ...shares.map((share) => sum(share, -1))),
    above: Math.max(0, ...shares.map((share) => sum(share, 1))),
  };
  at("list").replaceChildren(...answer.items.map((item, place) => row(item, place, shares[place], scale, colour)));
  at("list").classList.remove("waiting");
  describe();
}

/** What is above (side 1) or below zero (side -1), as a positive number. */
function sum(share, side) {
  return share.reduce((total, [, value]) => total + Math.max(side * value, 0), 0);
}

function row(item, place, share, scale, colour) {
  const title = item.title || item.item_id;
  const line = make("li", {},
    make("span", { className: "rank", textContent: place + 1 }),
    make("img", { className: "poster none", alt: "" }),
    make("span", { className: "name" },
      make("b", { textContent: title }), make("span", { className: "facts", textContent: item.item_id })),
    bar(share, scale, colour),
    make("span", { className: "score", textContent: item.score.toFixed(3) }));
  line.dataset.item = item.item_id;
  return line;
}

/** The members' parts stacked from zero, what lowers the score to the left and hatched; one scale for the whole list. */
function bar(share, scale, colour) {
  const whole = scale.below + scale.above || 1;
  const part = ([name, value], kind) => {
    const piece = make("span", { className: kind, colour: colour(name), title: `${name} ${value.toFixed(3)}` });
    piece.style.width = `${(Math.abs(value) / whole) * 100}%`;
    return piece;
  };
  const lower = share.filter(([, value]) => value < 0);
  const higher = share.filter(([, value]) => value > 0);
  const gap = make("span", { colour: "transparent" });
  gap.style.width = `${((scale.below - sum(share, -1)) / whole) * 100}%`;
  const zero = scale.below ? [make("span", { className: "zero" })] : [];
  const said = share.map(([name, value]) => `${name} ${value.toFixed(3)}`).join(", ");
  return make("div", { className: "bar", role: "img", "aria-label": `members: ${said}` },
    gap, ...lower.map((one) => part(one, "less")), ...zero, ...higher.map((one) => part(one, "more")));
}

/** What the catalogue says of items; asked for once each. Items that it does not have stay without. */
async function learn(ids) {
  const missing = ids.filter((item) => !state.known.has(item)).slice(0, 50);
  if (!missing.length) return;
  const { items } = await (await call(ofModel("v1/items", missing.map((item) => ["id", item])))).json();
  for (const item of missing) state.known.set(item, null);
  for (const item of items) state.known.set(item.item_id, item);
}

/** Adds to the rows what the members did not need: lists of attributes, those that were asked for, and pictures. */
async function describe() {
  const rows = [...at("list").children];
  const asked = new Set(Object.keys(question().filters));
  await learn(rows.map((row) => row.dataset.item)).catch(() => {});
  for (const row of rows) {
    const item = state.known.get(row.dataset.item);
    if (!item) continue;
    const told = Object.keys(state.about.filters).filter((column) => Array.isArray(item[column]) || asked.has(column));
    const facts = told.map((column) => [item[column] ?? "–"].flat().join(", "));
    row.querySelector(".facts").textContent = [item.item_id, ...facts].join(" · ");
    if (item.image) poster(row.querySelector("img"), item.item_id);
  }
}

/** A picture is fetched with the token, which an address in `src` could not carry. */
async function poster(image, item) {
  if (!state.pictures.has(item)) {
    const path = ofModel(`v1/items/${encodeURIComponent(item)}/image`);
    state.pictures.set(item, call(path).then((reply) => reply.blob()).then(URL.createObjectURL).catch(() => ""));
  }
  const address = await state.pictures.get(item);
  if (!address) return;
  image.src = address;
  image.classList.remove("none");
}

async function find() {
  const text = at("search").value.trim();
  if (!text || !state.about) return at("found").replaceChildren();
  try {
    const { items } = await (await call(ofModel("v1/items", [["limit", 8], ["search", text]]))).json();
    if (text !== at("search").value.trim()) return;
    at("found").replaceChildren(...items.map((item) => chip(item.item_id, item.title, "+", like)));
  } catch (error) {
    at("said").textContent = error.message;
  }
}

function chip(item, title, sign, action) {
  const button = make("button", { type: "button", textContent: `${sign} ${title || item}` });
  button.title = item;
  button.setAttribute("aria-label", `${sign === "+" ? "Add" : "Take out"} ${title || item}`);
  button.addEventListener("click", () => action(item));
  return make("li", {}, button);
}

function like(item) {
  state.liked.add(item);
  at("search").value = "";
  at("found").replaceChildren();
  likes();
}

async function likes() {
  recommend();
  await learn([...state.liked]).catch(() => {});
  const forget = (item) => { state.liked.delete(item); likes(); };
  at("liked").replaceChildren(...[...state.liked].map((item) => {
    const known = state.known.get(item);
    return chip(item, known === null ? `${item} (unknown)` : known?.title, "×", forget);
  }));
}

/** Several ids at once, with commas or line ends between them, as they come out of a table. */
function paste(event) {
  const text = event.clipboardData.getData("text");
  if (!/[,;\n]/.test(text)) return;
  event.preventDefault();
  for (const item of text.split(/[,;\n]+/).map((part) => part.trim()).filter(Boolean)) state.liked.add(item);
  likes();
}

function later(action) {
  let timer = 0;
  return () => { clearTimeout(timer); timer = setTimeout(action, PAUSE_MS); };
}

function start() {
  const soon = later(recommend);
  at("ask").addEventListener("input", (event) => {
    if (event.target.id === "diversity") at("diversity-value").textContent = event.target.value;
    if (event.target.id === "token") state.token = event.target.value.trim();
    if (event.target.id !== "search" && event.target.id !== "name") soon();
  });
  at("ask").addEventListener("submit", (event) => { event.preventDefault(); recommend(); });
  at("search").addEventListener("input", later(find));
  at("search").addEventListener("paste", paste);
  at("search").addEventListener("keydown", (event) => {
    const first = at("found").querySelector("button");
    if (event.key === "Enter" && first) { event.preventDefault(); first.click(); }
  });
  at("name").addEventListener("change", () => {
    for (const kept of [state.liked, state.known, state.pictures]) kept.clear();
    location.hash = "";
    about();
  });
  at("profile").addEventListener("change", () => {
    for (const input of at("weights").querySelectorAll("input")) input.disabled = at("profile").value !== "best";
  });
  at("reset").addEventListener("click", () => {
    for (const input of at("weights").querySelectorAll("input")) {
      input.value = 1;
      input.dispatchEvent(new Event("input", { bubbles: true }));
    }
  });
  // On a phone the list comes first, and what is asked rarely is folded away.
  if (matchMedia("(max-width: 800px)").matches) for (const fold of document.querySelectorAll("details.card")) fold.open = false;
  about();
}

start();
