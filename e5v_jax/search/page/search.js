// The search page: what is asked, what came back, and what is shown of it. No library.

const $ = (id) => document.getElementById(id);
const STEP = 60; // results of a request; "Show more" asks for as many again
const MOST = 500;
const LARGEST = 23 * 2 ** 20; // bytes of a photograph that the server takes

const query = { text: "", image: null, like: null, more: "", less: "", top: STEP };
let hits = [];
let shown = []; // those of the hits that the slider lets through
let at = -1; // the one in the viewer
let running = null; // the request on its way
let index = null;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const rounded = (score) => score.toFixed(3).replace("-", "\u2212");

// --- asking --------------------------------------------------------------------------------------

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  const content = await answer.json().catch(() => null);
  if (!answer.ok) throw new Error(content?.error?.message ?? `The server says ${answer.status}.`);
  return content;
}

const isAsked = () => Boolean(query.text || query.image || query.like);

async function search({ push = true, keep = false } = {}) {
  running?.abort();
  if (!keep) query.top = STEP;
  showChips();
  if (push) remember();
  if (!isAsked()) return showStart();
  running = new AbortController();
  const mine = running;
  const body = { top: query.top, hide_duplicates: $("duplicates").checked };
  if (query.text) body.text = query.text;
  if (query.image) body.image = query.image.base64;
  if (query.like) body.like = query.like.id;
  if (query.more) body.more = [query.more];
  if (query.less) body.less = [query.less];
  $("error").hidden = true;
  $("results").ariaBusy = "true";
  $("status").textContent = "Searching…";
  $("controls").hidden = false;
  const start = performance.now();
  try {
    const found = await ask("/api/search", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal: mine.signal,
    });
    hits = found.hits;
    setSlider(keep);
    show();
    const seconds = (performance.now() - start) / 1000;
    document.body.dataset.seconds = JSON.stringify({ ...found.seconds, page: seconds });
    $("further").hidden = hits.length < query.top || query.top >= MOST;
  } catch (error) {
    if (error.name === "AbortError") return;
    hits = [];
    show();
    showError(error.message);
    $("controls").hidden = true;
    $("further").hidden = true;
  } finally {
    if (mine === running) $("results").ariaBusy = "false";
  }
}

function showError(message, action = "Try again", act = () => search({ push: false })) {
  const button = element("button", { type: "button", textContent: action });
  button.addEventListener("click", act);
  $("error").replaceChildren(element("span", { textContent: message }), button);
  $("error").hidden = false;
  $("empty").hidden = true;
  $("status").textContent = "";
}

// The address says what is asked, so that going back works. A photograph is not in it.
function remember() {
  const words = new URLSearchParams();
  if (query.text) words.set("q", query.text);
  if (query.like) words.set("like", [query.like.id, query.like.kind, query.like.name].join(" "));
  if (query.more) words.set("more", query.more);
  if (query.less) words.set("less", query.less);
  const address = `/${words.size ? "?" : ""}${words}`;
  if (address !== location.pathname + location.search) history.pushState(null, "", address);
}

function recall() {
  const words = new URLSearchParams(location.search);
  const [id, kind, ...name] = (words.get("like") ?? "").split(" ");
  const like = Number(id) > 0 ? { id: Number(id), kind, name: name.join(" ") } : null;
  Object.assign(query, { text: words.get("q") ?? "", image: null, like });
  Object.assign(query, { more: words.get("more") ?? "", less: words.get("less") ?? "" });
  for (const name of ["text", "more", "less"]) $(name).value = query[name];
  if (query.more || query.less) $("terms").open = true;
}

function readForm() {
  for (const name of ["text", "more", "less"]) query[name] = $(name).value.trim();
}

// --- showing -------------------------------------------------------------------------------------

// From the worst to the best of what came back: how high cosines are depends on the model.
function setSlider(keep) {
  const slider = $("threshold");
  const scores = hits.map((hit) => hit.score);
  const least = Math.floor(Math.min(...scores, 1) * 1000) / 1000;
  const atStart = slider.value === slider.min;
  const before = slider.value;
  slider.min = least;
  slider.max = Math.max(...scores, least);
  slider.value = keep && !atStart ? before : least;
}

function show() {
  const least = Number($("threshold").value);
  shown = hits.filter((hit) => hit.score >= least);
  $("least").textContent = hits.length ? rounded(least) : "";
  $("results").replaceChildren(...shown.map(makeCard));
  $("controls").hidden = false;
  const all = index ? index.images + index.texts : 0;
  $("status").textContent = `${shown.length} of ${all.toLocaleString("en")} shown`;
  $("empty").hidden = shown.length > 0;
  if (!shown.length) {
    showEmpty("Nothing found", "Nothing in the index is left to compare with.");
  }
}

function makeCard(hit, position) {
  const where = hit.line ? `${hit.name}:${hit.line}` : hit.name;
  const open = element("button", { type: "button", className: "open", tabIndex: position ? -1 : 0 });
  if (hit.kind === "image") {
    const image = element("img", { alt: hit.name, src: `/thumbnail/${hit.id}`, loading: "lazy" });
    Object.assign(image, { width: hit.width ?? 4, height: hit.height ?? 3, decoding: "async" });
    open.append(image);
  } else {
    const words = element("span", { textContent: hit.text });
    open.append(element("span", { className: "words" }, words));
  }
  const name = element("span", { className: "name", title: hit.path });
  name.append(element("bdi", { textContent: where }));
  const score = element("span", { className: "score", textContent: rounded(hit.score) });
  open.append(element("span", { className: "caption" }, name, score));
  open.ariaLabel = `${hit.kind === "image" ? where : hit.text}, score ${rounded(hit.score)}`;
  open.addEventListener("click", () => view(position));
  const like = element("button", { type: "button", className: "like", tabIndex: -1 });
  like.textContent = "More like this";
  like.ariaLabel = `More like this: ${where}`;
  like.addEventListener("click", () => searchLike(hit));
  return element("li", {}, open, like);
}

function showEmpty(title, ...lines) {
  const parts = lines.map((line) => (typeof line === "string" ? element("p", { textContent: line }) : line));
  $("empty").replaceChildren(element("h2", { textContent: title }), ...parts);
  $("empty").hidden = false;
}

function showStart() {
  hits = [];
  shown = [];
  $("results").replaceChildren();
  $("controls").hidden = true;
  $("further").hidden = true;
  $("error").hidden = true;
  if (!index) return;
  if (index.images + index.texts === 0) {
    const command = element("code", { textContent: "python -m e5v_jax.search index FOLDER --index INDEX" });
    showEmpty("Nothing is indexed yet", "Add photographs and texts, then load this page again:", element("p", {}, command));
  } else {
    showEmpty("What are you looking for?", "Type some words, or drop, paste or choose a photograph. Both together change the photograph as the words say.");
  }
}

function showChips() {
  const chips = [];
  const chip = (source, text, remove) => {
    const button = element("button", { type: "button", textContent: "×" });
    button.ariaLabel = `Remove ${text}`;
    button.addEventListener("click", () => {
      remove();
      readForm();
      search();
      $("text").focus();
    });
    const image = source ? [element("img", { src: source, alt: "" })] : [];
    chips.push(element("li", {}, ...image, element("span", { textContent: text }), button));
  };
  if (query.image) chip(query.image.url, query.image.name, () => (query.image = null));
  if (query.like) {
    const source = query.like.kind === "image" ? `/thumbnail/${query.like.id}` : null;
    chip(source, `like ${query.like.name}`, () => (query.like = null));
  }
  $("chips").replaceChildren(...chips);
  $("chips").hidden = !chips.length;
}

function searchLike(hit) {
  $("viewer").close();
  Object.assign(query, { text: "", image: null, like: hit });
  $("text").value = "";
  search();
  scrollTo(0, 0);
}

// --- the viewer ----------------------------------------------------------------------------------

function view(position) {
  const hit = shown[position];
  if (!hit) return;
  at = position;
  const image = hit.kind === "image";
  // a browser shows the photograph upright, as the thumbnail is
  const content = image
    ? element("img", { src: `/original/${hit.id}`, alt: hit.name })
    : element("p", { textContent: hit.text });
  if (image) {
    content.addEventListener("error", () => (content.src = `/thumbnail/${hit.id}`), { once: true });
  }
  $("stage").replaceChildren(content);
  $("viewed").textContent = hit.line ? `${hit.name}:${hit.line}` : hit.name;
  $("place").textContent = `${hit.path} · score ${rounded(hit.score)}`;
  $("original").href = `/original/${hit.id}`;
  $("previous").disabled = position === 0;
  $("next").disabled = position === shown.length - 1;
  if (!$("viewer").open) $("viewer").showModal();
}

$("previous").addEventListener("click", () => view(at - 1));
$("next").addEventListener("click", () => view(at + 1));
$("similar").addEventListener("click", () => searchLike(shown[at]));
$("close").addEventListener("click", () => $("viewer").close());
$("viewer").addEventListener("click", (event) => {
  if (event.target === $("viewer")) $("viewer").close();
});
$("viewer").addEventListener("close", () => focusCard(at));

// --- keyboard ------------------------------------------------------------------------------------

const cards = () => [...document.querySelectorAll(".open")];

function focusCard(position) {
  const all = cards();
  const next = all[Math.max(0, Math.min(position, all.length - 1))];
  if (!next) return;
  for (const card of all) card.tabIndex = card === next ? 0 : -1;
  next.focus();
}

function columns(all) {
  const below = all.findIndex((card) => card.parentNode.offsetTop > all[0].parentNode.offsetTop);
  return below < 0 ? all.length : below;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], input[type=text]");
  if ($("viewer").open) {
    if (event.key === "ArrowLeft") view(at - 1);
    if (event.key === "ArrowRight") view(at + 1);
    if (event.key === "m") searchLike(shown[at]);
    return; // Esc closes a dialog by itself
  }
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("text").focus();
    $("text").select();
    return;
  }
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    return;
  }
  const all = cards();
  const here = all.indexOf(document.activeElement);
  if (here < 0) {
    if (event.key === "ArrowDown" && (typing || event.target === document.body) && all.length) {
      event.preventDefault();
      focusCard(0);
    }
    return;
  }
  const wide = columns(all);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide, Home: -here, End: all.length - 1 - here };
  if (event.key in steps) {
    event.preventDefault();
    if (event.key === "ArrowUp" && here < wide) return $("text").focus();
    if (here + steps[event.key] < all.length) focusCard(here + steps[event.key]);
  } else if (event.key === "m") {
    searchLike(shown[here]);
  }
});

// --- a photograph to search by -------------------------------------------------------------------

async function take(file) {
  if (!file) return;
  const refuse = (reason) =>
    showError(`${file.name} ${reason}`, "Close", () => ($("error").hidden = true));
  if (file.type && !file.type.startsWith("image/")) return refuse("is no photograph.");
  if (file.size > LARGEST) return refuse("is larger than 23 MB: make it smaller.");
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  }).catch(() => null);
  if (!url) return refuse("cannot be read.");
  const base64 = url.slice(url.indexOf(",") + 1);
  Object.assign(query, { image: { base64, name: file.name || "a photograph", url: URL.createObjectURL(file) }, like: null });
  readForm();
  search();
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  take($("file").files[0]);
  $("file").value = "";
});
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
  if (file) {
    event.preventDefault();
    take(file);
  }
});
const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFile(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!hasFile(event)) return;
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});

// --- from here it starts -------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  readForm();
  search();
});
$("threshold").addEventListener("input", show);
$("duplicates").addEventListener("change", () => search({ push: false, keep: true }));
$("further").addEventListener("click", () => {
  query.top = Math.min(MOST, query.top + STEP);
  search({ push: false, keep: true });
});
addEventListener("popstate", () => {
  recall();
  search({ push: false });
});

try {
  index = await ask("/api/index");
  const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
  $("size").textContent = `${count(index.images, "photograph")}, ${count(index.texts, "text")}`;
  recall();
  search({ push: false });
} catch (error) {
  showError(error.message);
}
