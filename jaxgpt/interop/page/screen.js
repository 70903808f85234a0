"use strict";
// What is on the screen. page.js computes it, in a worker; all text is set as text, never as markup.

const find = (id) => document.getElementById(id);
const run = JSON.parse(find("run").textContent);
const size = run.config.block_size;

// Calls of the worker: each has a number, may show tokens while it runs, and ends with a result or an error.

const worker = new Worker(URL.createObjectURL(new Blob([find("model").textContent], { type: "text/javascript" })));
const calls = new Map();
let number = 0;

function call(method, args, show = () => {}) {
  number += 1;
  worker.postMessage({ id: number, method, args });
  return new Promise((resolve, reject) => calls.set(number, { resolve, reject, show }));
}

worker.onmessage = ({ data: { id, shown, result, error } }) => {
  const { resolve, reject, show } = calls.get(id);
  if (shown) return show(shown);
  calls.delete(id);
  if (error === undefined) resolve(result);
  else reject(new Error(error));
};

call("load", { run, base64: find("weights").textContent }).catch(complain); // the worker takes one message after another
find("weights").remove(); // it is large

// A text on the screen: a span for each token.

const views = { written: { box: find("written"), spans: [] }, validation: { box: find("validation"), spans: [] } };
let view = views.written, current = null;

function clear(which) {
  hide();
  which.box.replaceChildren();
  which.spans = [];
}

function append(which, token) {
  const span = document.createElement("span");
  span.textContent = token.text;
  span.className = `token${token.text === "\n" ? " newline" : ""}${token.text === "" ? " part" : ""}`;
  span.tabIndex = which.spans.length ? -1 : 0;
  Object.assign(span, { token, which, place: which.spans.length });
  if (token.probability !== null) {
    const bits = -Math.log2(token.probability); // two bits, a chance of 1/4, have no colour
    span.classList.add(bits < 2 ? "expected" : "surprising");
    span.style.setProperty("--strength", Math.min(Math.abs(bits - 2) / (bits < 2 ? 2 : 5), 1).toFixed(3));
  }
  which.spans.push(span);
  which.box.append(span);
}

const readable = (text) => text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "\u2205";
const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 0.0005 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");
const element = (name, className, text = "") =>
  Object.assign(document.createElement(name), { className, textContent: text });

function showCard({ token, which, place }) { // the ten likeliest tokens at the place of this one
  const rows = token.top.map((each) => line(each, each.id === token.id));
  if (rows.length && !token.top.some((each) => each.id === token.id)) rows.push(line(token, true));
  const before = which.spans.slice(Math.max(place - 12, 0), place).map((span) => span.token.text).join("");
  const title = element("p", "after", rows.length ? `after \u201c\u2026${readable(before)}\u201d` : "Nothing before it");
  find("card").replaceChildren(title, ...rows);
  find("card").hidden = false;
}

function line({ text, probability }, isTaken) {
  const row = element("div", isTaken ? "line taken" : "line");
  const bar = element("i", "");
  row.dataset.probability = probability;
  bar.style.setProperty("--share", probability);
  row.append(element("code", "", readable(text)), bar, element("span", "", percent(probability)));
  return row;
}

function place(card, span) { // below the token, or above it; on a narrow screen the style sheet puts it at the bottom
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect(), { offsetWidth: width, offsetHeight: height } = card;
  const below = at.bottom + 8 + height < innerHeight || at.top < height + 8;
  card.style.setProperty("left", `${Math.max(8, Math.min(at.left - 24, document.body.clientWidth - width - 8))}px`);
  card.style.setProperty("top", `${below ? at.bottom + 8 : at.top - height - 8}px`);
}

function choose(span) {
  hide();
  current = span;
  span.classList.add("current");
  if (find("stage").dataset.mode === "attention") return attend(span);
  showCard(span);
  span.setAttribute("aria-describedby", "card");
  place(find("card"), span);
}

function uncover(span) { // on a narrow screen, a token that is below the card
  const covered = span.getBoundingClientRect().bottom + 16 - find("card").getBoundingClientRect().top;
  if (matchMedia("(max-width: 760px)").matches && !find("card").hidden && covered > 0) scrollBy(0, covered);
}

const leave = () => find("stage").dataset.mode === "attention" || hide(); // attention stays until the next token

function hide() {
  find("card").hidden = true;
  current?.classList.remove("current");
  current?.removeAttribute("aria-describedby");
  for (const span of view.box.querySelectorAll(".seen")) span.classList.remove("seen");
  current = null;
}

// Attention. A text that is longer than the window is read in windows that overlap by half.

const quoted = (span) => `\u201c${readable(span.token.text)}\u201d`;
let read = { key: "", weights: null }, marked = null;

async function attend(span) {
  marked = span;
  const { spans } = span.which, half = Math.ceil(size / 2), layer = find("layer").value, head = Number(find("head").value);
  const start = span.place < size ? 0 : (Math.floor((span.place - size) / half) + 1) * half;
  const tokens = spans.slice(start, start + size).map((each) => each.token.id), T = tokens.length;
  const key = `${layer} ${tokens}`;
  if (read.key !== key) read = { key, weights: call("attention", { tokens, layer }) };
  const weights = await read.weights, t = span.place - start;
  if (current !== span) return;
  const row = weights.subarray((head * T + t) * T, (head * T + t) * T + t + 1);
  span.which.box.style.setProperty("--most", Math.max(...row));
  row.forEach((weight, s) => {
    spans[start + s].classList.add("seen");
    spans[start + s].style.setProperty("--weight", weight);
  });
  const seen = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 3);
  const named = seen.map((s) => `${quoted(spans[start + s])} ${percent(row[s])}`);
  const who = `${quoted(span)}, token ${span.place + 1}, attends most to ${named.join(", ")}`;
  find("status").textContent = `Layer ${Number(layer) + 1}, head ${head + 1}: ${who}`;
}

for (const { box } of Object.values(views)) {
  const over = (event) => event.target.closest(".token");
  box.addEventListener("pointermove", (event) => { // unlike pointerover, not when the text scrolls under the pointer
    if (event.pointerType === "mouse" && over(event) && over(event) !== current) choose(over(event));
  });
  box.addEventListener("pointerleave", () => box.contains(document.activeElement) || leave());
  box.addEventListener("click", (event) => {
    if (!over(event)) return hide();
    over(event).focus({ preventScroll: true });
    uncover(over(event)); // not before: the click would then end on another token
  });
  box.addEventListener("focusin", (event) => {
    for (const span of box.querySelectorAll("[tabindex='0']")) span.tabIndex = -1; // the text is one stop of the Tab key
    event.target.tabIndex = 0;
    choose(event.target);
    if (event.target.matches(":focus-visible")) uncover(event.target); // from the keyboard
  });
  box.addEventListener("focusout", leave);
  box.addEventListener("keydown", (event) => {
    const { spans } = view, at = event.target.place, last = spans.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last, ArrowDown: at + 20, ArrowUp: at - 20 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    spans[Math.min(Math.max(to, 0), last)].focus();
  });
}
addEventListener("scroll", () => current && !find("card").hidden && place(find("card"), current), { passive: true });

// The controls.

let writing = 0; // the number of the call that writes, 0 if none does

function complain(error) {
  find("problem").textContent = error.message;
}

function report(which, seconds) {
  const count = which.spans.length;
  const nats = which.spans.flatMap(({ token }) => (token.probability === null ? [] : [-Math.log(token.probability)]));
  const mean = nats.reduce((a, b) => a + b, 0) / nats.length;
  const speed = seconds ? `${count} tokens in ${seconds.toFixed(1)} s, ${Math.round(count / seconds)} per second` : "";
  const loss = nats.length ? `mean loss ${mean.toFixed(2)} nats per token` : "";
  find("status").textContent = [speed, loss].filter(Boolean).join(" \u00b7 ");
}

async function write() {
  find("problem").textContent = "";
  find("go").textContent = "Stop";
  select("view", "written");
  clear(views.written);
  const args = {
    text: find("prompt").value,
    maxNewTokens: Number(find("length").value),
    temperature: Number(find("temperature").value),
    topK: Number(find("topk").value),
    seed: Number(find("seed").value),
  };
  try {
    const started = performance.now(), made = call("complete", args, (token) => append(views.written, token));
    writing = number;
    await made;
    report(views.written, (performance.now() - started) / 1000);
  } catch (error) {
    complain(error);
  }
  writing = 0;
  find("go").textContent = "Write";
}

find("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if (writing) worker.postMessage({ method: "stop", args: writing });
  else write();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("controls").requestSubmit();
});
const showDegrees = () => (find("degrees").textContent = Number(find("temperature").value).toFixed(2));
find("temperature").addEventListener("input", showDegrees);
showDegrees();

function select(name, value) {
  document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
  hide();
  if (name === "mode") {
    find("stage").dataset.mode = value;
    if (value === "attention") attendAgain();
    return;
  }
  view = views[value];
  for (const each of Object.values(views)) each.box.hidden = each !== view;
  report(view);
  if (value === "validation") predict();
}

function attendAgain() { // to the token that was chosen last, or to the last one of the text
  const span = marked?.which === view && marked.isConnected ? marked : view.spans.at(-1);
  if (span) choose(span);
}

async function predict() {
  const which = views.validation;
  if (which.asked) return;
  which.asked = true;
  await call("predict", { tokens: run.validation }, (token) => append(which, token));
  if (view === which) report(which);
}

for (const input of document.querySelectorAll("#bar input")) {
  input.addEventListener("change", () => select(input.name, input.value));
}

const short = (n) => (n < 1e5 ? n.toLocaleString("en") : `${(n / 1e6).toFixed(n < 1e7 ? 2 : 1)} M`);
const heads = run.config.n_layer ? `${run.config.n_layer} layers of ${run.config.n_head} heads` : "no layers";
document.title = find("name").textContent = run.name;
find("facts").textContent =
  `${short(run.parameters)} parameters \u00b7 ${heads} \u00b7 a window of ${size} tokens \u00b7 step ${run.step.toLocaleString("en")}`;
find("views").hidden = !run.validation.length;
find("modes").hidden = find("heads").hidden = !run.config.n_layer;
for (const [id, n] of [["layer", run.config.n_layer], ["head", run.config.n_head]]) {
  for (let i = 0; i < n; i++) find(id).append(new Option(i + 1, i));
  find(id).addEventListener("change", attendAgain);
}

// For programs: the same calls without the screen.

window.jaxgpt = {
  complete: (text, options = {}) => call("complete", { ...options, text }),
  logits: (text) => call("logits", { text }),
  encode: (text) => call("encode", { text }),
};
write();
