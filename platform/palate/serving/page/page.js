// The page of a served Palate. It asks the API at its own address (text, or images) and under images/ (images), with the
// key that is typed in. What a model or a person wrote reaches the document as text only: see `make`.

const KEY = "palate-key"; // in the tab's session storage
const NEW = "new"; // the choice of a person who is not listed
const DRAWN = 4; // images of one prompt
const PAUSE = 500; // milliseconds after the last move of the slider until the personal answer is asked for again
const PATIENCE = 120; // looks at a person whose vector is being fitted, half a second apart
const NAMES = "ABCDEFGHIJKLMNOP";

const ANSWERS = [
  { kind: "base", title: "Base model" },
  { kind: "cluster", title: "Cluster" },
  { kind: "personal", title: "Personal" },
];

/** How an answer was written, by what the server says of the person (x-palate-personalization). */
function how(kind, known, user, beta) {
  if (kind === "base") return "no adapter, no vector";
  if (kind === "cluster") return known === "personal" ? `people who write like ${user}` : "the largest of all";
  const vectors = {
    personal: `${user}'s own vector`,
    pending: `${user}'s texts are still being fitted: everybody's mean`,
    population: user ? `nothing is known of ${user} yet: everybody's mean` : "no person is chosen: everybody's mean",
  };
  return `${vectors[known] ?? known}, beta ${beta.toFixed(1)}`;
}

const state = {
  key: sessionStorage.getItem(KEY) ?? "",
  text: null, // the base of the API of text, "" where it is there
  images: null, // the base of the API of images, "" or "images/"
  asked: null, // what the answers on the page were asked: {prompt, model, user, temperature, most, seed}
  asking: new Set(), // answers that are being written
  drawn: null, // {prompt, model} of the images on the page
  drawing: null, // an AbortController
};

const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text, never HTML. */
function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

// The API

class Failure extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Ask the API; an answer that is no success is thrown as a Failure. */
async function call(path, { body, signal } = {}) {
  const headers = {};
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store" };
  if (body !== undefined) options.body = JSON.stringify(body);
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "");
  }
  if (answer.ok) return answer;
  const said = await answer.json().then((found) => found.error?.message, () => null);
  throw new Failure(answer.status, said ?? "", Number(answer.headers.get("Retry-After")) || null);
}

const json = async (path, options) => (await call(path, options)).json();

/** The events of a stream, as objects. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: ?/, "");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Failure(event.error.type === "server_error" ? 500 : 400, event.error.message);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
    throw new Failure(0, "");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Failure(0, ""); // without its end mark
}

/** What went wrong, in words for a person. */
function words(error) {
  if (!(error instanceof Failure)) return `This page has failed: ${error.message}`;
  const leads = {
    0: "The server cannot be reached, or broke off: is it running?",
    401: "The server does not accept the key.",
    403: "This key may not do that.",
    404: "The server has no such thing.",
    413: "That is more than the server takes.",
    429: "Too much of this key is under way.",
    501: "This server does not do that.",
    503: "The server cannot answer just now.",
  };
  const lead = leads[error.status] ?? (error.status < 500 ? "The server refuses this." : "The server has failed.");
  const said = error.message ? ` ${error.message[0].toUpperCase()}${error.message.slice(1).replace(/\.$/, "")}.` : "";
  const seconds = error.retryAfter;
  return lead + said + (seconds ? ` Try again in ${seconds} second${seconds === 1 ? "" : "s"}.` : "");
}

/** Show a problem at its place, or none; `control` is marked as what caused it. */
function problem(place, text, control) {
  place.hidden = !text;
  place.textContent = text;
  control?.toggleAttribute("aria-invalid", false);
  if (text) control?.setAttribute("aria-invalid", "true");
}

/** Show an error where it was caused; a refused key is shown at the key, too. */
function failed(place, error, control) {
  if (error.name === "AbortError") return;
  problem(place, words(error), control);
  if (error.status === 401) askForKey(state.key ? words(error) : "");
}

const say = (text, place = "status") => { $(place).textContent = text; };

// The key, and what is served

function askForKey(text) {
  $("key-section").hidden = false;
  $("connected").hidden = true;
  problem($("key-problem"), text, $("key"));
}

/** The models of an API: a list, null where there is none. */
async function models(base) {
  try {
    const found = await json(`${base}v1/models`);
    return Array.isArray(found.data) ? found.data : null;
  } catch (error) {
    if (error.status === 404 || error.status === 405) return null;
    throw error;
  }
}

async function connect() {
  problem($("key-problem"), "", $("key"));
  for (const name of ["person", "text", "images"]) $(`${name}-section`).hidden = true;
  for (const name of ["text", "images"]) $(`${name}-absent`).hidden = true;
  $("nothing").hidden = true;
  let own, beside;
  try {
    [own, beside] = await Promise.all([models(""), models("images/")]);
  } catch (error) {
    if (error.status === 401) askForKey(state.key ? words(error) : "");
    else if (state.key && !$("key-section").hidden) askForKey(words(error));
    else {
      $("nothing").hidden = false;
      $("nothing").textContent = `${words(error)} Then reload this page.`;
    }
    return false;
  }
  const all = own ?? [];
  const writing = all.filter((model) => "clusters" in model);
  const here = all.filter((model) => model.task === "generate");
  const drawing = here.length ? here : (beside ?? []).filter((model) => model.task === "generate");
  state.text = writing.length ? "" : null;
  state.images = drawing.length ? (here.length ? "" : "images/") : null;
  await showPeople();
  $("key-section").hidden = true;
  $("connected").hidden = false;
  $("connected-as").textContent = state.key ? "Connected" : "Connected: this server wants no key";
  $("forget").hidden = !state.key;
  show("text", writing, absentText(all));
  show("images", drawing, absentImages(all, beside));
  $("person-section").hidden = state.text === null && state.images === null;
  const parts = [...(state.text === null ? [] : ["text"]), ...(state.images === null ? [] : ["images"])];
  say(parts.length ? `This server has ${parts.join(" and ")}.` : "");
  return true;
}

function absentText(all) {
  if (all.some((model) => "image_tokens" in model)) {
    return "No text of people is served here: the models at this address read images, and know no people. Add a run of jobs/card.py.";
  }
  return "No text is served here. To have it, start a trained run: serve run serve/config.yaml (docs/serving.md).";
}

function absentImages(all, beside) {
  if (beside?.length || all.some((model) => model.task === "edit")) {
    return "No images are drawn here: the models that are served edit images. Add one that generates (docs/serving_images.md).";
  }
  if (beside) return "The image server has no model loaded yet. Reload this page in a moment.";
  return "No images are served here. To have them, add serve.images:app to the config, with route_prefix /images (docs/serving_images.md).";
}

/** Show a section with the models to choose from, or the sentence that says why it is not there. */
function show(name, found, absent) {
  $(`${name}-section`).hidden = !found.length;
  $(`${name}-absent`).hidden = found.length > 0;
  $(`${name}-absent`).textContent = found.length ? "" : absent;
  const select = $(name === "text" ? "text-model" : "image-model");
  select.replaceChildren(...found.map((model) => make("option", { value: model.id }, label(model))));
  select.models = new Map(found.map((model) => [model.id, model]));
  $(`${select.id}-field`).hidden = found.length < 2;
  if (name === "text" && found.length) followModel();
}

function label(model) {
  if (model.task) return `${model.id} (${model.size}${model.personal ? ", knows people" : ""})`;
  return model.live && model.id !== model.run ? `${model.id} (live: ${model.run})` : model.id;
}

/** Start the slider at the strength that the chosen run is served with. */
function followModel() {
  const usual = $("text-model").models.get($("text-model").value)?.beta ?? 1;
  $("beta").max = Math.max(5, Math.min(10, Math.ceil(2 * usual)));
  $("beta").value = usual;
  $("beta-hint").textContent = `This run's own is ${usual}; 0 leaves the cluster's model as it is.`;
  showBeta();
}

const showBeta = () => { $("beta-value").textContent = Number($("beta").value).toFixed(1); };

// The person

/** The chosen person's id; null for nobody. */
function person() {
  const chosen = $("person").value;
  const id = state.text === null || chosen === NEW ? $("person-id").value.trim() : chosen.slice(1);
  return id || null;
}

async function showPeople() {
  const listed = state.text !== null;
  $("person-choice").hidden = !listed;
  problem($("person-problem"), "");
  if (listed) {
    let people = [];
    try {
      people = (await json("v1/users?limit=1000")).data;
    } catch (error) {
      failed($("person-problem"), error, $("person"));
    }
    const before = $("person").value;
    $("person").replaceChildren(
      make("option", { value: "" }, "Nobody in particular"),
      ...people.map((id) => make("option", { value: `=${id}` }, id)),
      make("option", { value: NEW }, "Somebody else…"),
    );
    if (before) $("person").value = before;
    if (!$("person").value) $("person").value = "";
  }
  await showPerson();
}

async function showPerson() {
  $("person-other").hidden = state.text !== null && $("person").value !== NEW;
  problem($("person-problem"), "", $("person-id"));
  const id = person();
  const known = $("person-known");
  known.replaceChildren();
  if (state.text === null || id === null) {
    if (state.text !== null && $("person").value === "") {
      known.append(make("p", { className: "muted" }, "Without a person, answers are those of the largest cluster, and of everybody's mean."));
    }
    return;
  }
  await refreshPerson(id);
}

/** Show what is known of the chosen person, again as soon as their vector is fitted. */
async function refreshPerson(id) {
  const known = $("person-known");
  try {
    const found = await json(`v1/users/${encodeURIComponent(id)}`);
    if (person() !== id) return;
    known.replaceChildren(facts(found));
    if (found.status !== "pending") return;
    await fitted(id, () => person() === id);
    if (person() === id) await refreshPerson(id);
  } catch (error) {
    if (person() !== id) return;
    known.replaceChildren();
    if (error.status === 404) {
      known.append(make("p", { className: "muted" }, `Nothing is known of ${id} yet. What is sent as their text below makes them known.`));
    } else failed($("person-problem"), error, $("person"));
  }
}

function facts(found) {
  const list = make("dl", { className: "facts" });
  const add = (name, value, style = "") => {
    list.append(make("div", {}, make("dt", {}, name), make("dd", { className: style }, value)));
  };
  add("Texts", String(found.texts));
  add("Vector", { personal: "their own", pending: "being fitted", population: "everybody's mean" }[found.status] ?? found.status);
  if (found.cluster !== undefined) add("Cluster", String(found.cluster));
  const some = (given) => given.slice(0, 6).map((word) => word.text.trim()).filter(Boolean).join(", ");
  const more = some(found.vector?.promoted ?? []);
  const less = some(found.vector?.demoted ?? []);
  if (more) add("Leans to", more, "words");
  if (less) add("Away from", less, "words");
  return list;
}

/** Look at a person until their vector is fitted, or nobody wants to know; null if it was not. */
async function fitted(id, wanted = () => true) {
  for (let look = 0; look < PATIENCE && wanted(); look += 1) {
    const found = await json(`v1/users/${encodeURIComponent(id)}`);
    if (found.status !== "pending") return found;
    await new Promise((resolve) => { setTimeout(resolve, 500); });
  }
  return null;
}

// Text

/** An answer on the page: its element, and how to write into it. */
function answerOf({ kind, title }) {
  const prose = make("div", { className: "prose" });
  const text = document.createTextNode("");
  prose.append(text);
  const noted = make("p", { className: "muted small" });
  const wrong = make("p", { className: "problem", role: "alert", hidden: true, id: `${kind}-problem` });
  const said = make("p", { className: "said small", role: "status" });
  const edit = make("button", { type: "button", hidden: true }, "Edit", make("span", { className: "unseen" }, ` the answer: ${title}`));
  const actions = make("div", { className: "row" }, edit);
  const element = make("article", { className: `answer ${kind}`, "aria-label": title },
    make("div", {}, make("h3", {}, title), noted), prose, wrong, said, actions);
  const answer = { kind, title, element, prose, text, noted, wrong, said, edit, actions, asked: null, stop: null, editing: null };
  edit.addEventListener("click", () => beginEdit(answer));
  return answer;
}

const answers = new Map(ANSWERS.map((one) => [one.kind, answerOf(one)]));

function options(kind) {
  const { model, prompt, temperature, most, seed, user } = state.asked;
  const body = { model, messages: [{ role: "user", content: prompt }], temperature, seed, stream: true };
  if (most) body.max_completion_tokens = most;
  if (kind === "base") return { ...body, personalization: { base: true } };
  if (user) body.user = user;
  return { ...body, personalization: { beta: kind === "cluster" ? 0 : Number($("beta").value) } };
}

/** Write one answer; an older one in its place is stopped. */
async function write(answer) {
  answer.stop?.abort();
  endEdit(answer);
  const stop = new AbortController();
  answer.stop = stop;
  answer.asked = { ...state.asked };
  answer.text.data = "";
  answer.prose.classList.add("writing");
  answer.element.setAttribute("aria-busy", "true");
  answer.edit.hidden = true;
  answer.said.textContent = "";
  problem(answer.wrong, "");
  state.asking.add(answer);
  showAsking();
  const body = options(answer.kind);
  let reason = null;
  let whole = false;
  try {
    const found = await call("v1/chat/completions", { body, signal: stop.signal });
    const known = found.headers.get("x-palate-personalization");
    answer.noted.textContent = how(answer.kind, known, answer.asked.user, body.personalization.beta);
    for await (const event of events(found)) {
      const choice = event.choices?.[0];
      if (answer.stop !== stop) return;
      if (choice?.delta?.content) answer.text.appendData(choice.delta.content);
      reason = choice?.finish_reason ?? reason;
    }
    whole = true;
    if (!answer.text.data) answer.said.textContent = "The model ended without a word.";
    else if (reason === "length") answer.said.textContent = "It ends here because it may be no longer.";
  } catch (error) {
    if (answer.stop !== stop) return;
    if (error.name === "AbortError") answer.said.textContent = "Stopped.";
    else failed(answer.wrong, error);
  } finally {
    if (answer.stop === stop) {
      answer.stop = null;
      answer.whole = whole;
      answer.prose.classList.remove("writing");
      answer.element.removeAttribute("aria-busy");
      answer.edit.hidden = !answer.text.data;
      state.asking.delete(answer);
      showAsking();
    }
  }
}

function showAsking() {
  const running = state.asking.size > 0;
  if (!running && document.activeElement === $("ask-stop")) $("prompt").focus();
  $("ask-stop").hidden = !running;
}

async function ask(event) {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (!prompt.trim()) {
    problem($("ask-problem"), "Write what you want to ask first.", $("prompt"));
    $("prompt").focus();
    return;
  }
  problem($("ask-problem"), "", $("prompt"));
  const unsent = [...answers.values()].find((one) => one.editing && one.editing.field.value !== one.text.data);
  if (unsent) {
    problem($("ask-problem"), `What you made of the answer "${unsent.title}" is not sent yet: send it, or cancel it.`);
    unsent.editing.field.focus();
    return;
  }
  if ($("person").value === NEW && person() === null) {
    problem($("person-problem"), "Enter the id of the person, or choose nobody.", $("person-id"));
    $("person-id").focus();
    return;
  }
  state.asked = {
    prompt,
    model: $("text-model").value,
    user: person(),
    temperature: $("temperature").valueAsNumber,
    most: $("most").valueAsNumber || null,
    seed: Math.floor(Math.random() * 2 ** 31), // the same for all three: what differs is the model's
  };
  if (!$("answers").childElementCount) $("answers").append(...[...answers.values()].map((one) => one.element));
  say("Three answers are being written.", "ask-said");
  await Promise.all([...answers.values()].map(write));
  const whole = [...answers.values()].filter((one) => one.whole).length;
  if (!state.asking.size) say(whole === answers.size ? "All three answers are there." : "", "ask-said");
}

let moved = null;

/** After the slider has come to rest, write the personal answer again, unless somebody is editing it. */
function reask() {
  showBeta();
  clearTimeout(moved);
  const answer = answers.get("personal");
  if (!state.asked || !answer.asked || answer.editing) return;
  moved = setTimeout(() => {
    if (!answer.editing) write(answer);
  }, PAUSE);
}

function beginEdit(answer) {
  const user = answer.asked.user ?? person();
  problem(answer.wrong, "");
  answer.said.textContent = "";
  if (!user) {
    problem(answer.wrong, "Choose a person above first: what you make of this answer becomes a text of theirs.");
    ($("person-choice").hidden ? $("person-id") : $("person")).focus();
    return;
  }
  const id = `${answer.kind}-edited`;
  const field = make("textarea", { id, value: answer.text.data, maxLength: 100000, rows: 4 });
  field.setAttribute("aria-describedby", answer.wrong.id);
  const send = make("button", { type: "button", className: "first" }, `Send as ${user}'s text`);
  const cancel = make("button", { type: "button" }, "Cancel");
  const box = make("div", {}, make("label", { htmlFor: id }, `How ${user} would write it`), field);
  answer.editing = { field, parts: [box, send, cancel] };
  answer.prose.hidden = true;
  answer.edit.hidden = true;
  answer.prose.after(box);
  answer.actions.append(send, cancel);
  send.addEventListener("click", () => sendEdit(answer, user, field, send));
  cancel.addEventListener("click", () => { endEdit(answer); answer.edit.focus(); });
  field.focus();
}

function endEdit(answer) {
  if (!answer.editing) return;
  for (const part of answer.editing.parts) part.remove();
  answer.editing = null;
  answer.prose.hidden = false;
  answer.edit.hidden = !answer.text.data;
}

async function sendEdit(answer, user, field, send) {
  const edited = field.value;
  if (!edited.trim()) {
    problem(answer.wrong, "There is nothing to send: the text is empty.", field);
    field.focus();
    return;
  }
  if (send.getAttribute("aria-disabled") === "true") return;
  send.setAttribute("aria-disabled", "true");
  problem(answer.wrong, "", field);
  try {
    await json("v1/feedback", { body: { user, prompt: answer.asked.prompt, answer: answer.text.data, edited } });
  } catch (error) {
    send.removeAttribute("aria-disabled");
    failed(answer.wrong, error, field);
    return;
  }
  endEdit(answer);
  answer.edit.focus();
  answer.said.textContent = `Stored as ${user}'s latest text. Their vector is being fitted…`;
  if (person() === user && $("person").value === NEW) await list(user);
  try {
    const found = await fitted(user);
    const texts = found && `${found.texts} text${found.texts === 1 ? "" : "s"}`;
    answer.said.textContent = found
      ? `Stored as ${user}'s latest text, and their vector is fitted to ${texts}: ask again to see it.`
      : `Stored as ${user}'s latest text. Their vector is still being fitted.`;
    if (person() === user) await refreshPerson(user);
  } catch (error) {
    failed(answer.wrong, error);
  }
}

/** Put somebody new among the listed people, chosen. */
async function list(user) {
  const value = `=${user}`;
  if (![...$("person").options].some((one) => one.value === value)) {
    $("person").lastElementChild.before(make("option", { value }, user));
  }
  $("person").value = value;
  await showPerson();
}

// Images

const listed = () => [...$("images").children];

/** A place for an image that is being drawn. */
function imageOf(index, prompt) {
  const name = NAMES[index];
  const bar = make("progress", { max: 1, value: 0, "aria-label": `Image ${name}` });
  const steps = make("span", { className: "small" }, "waiting");
  const frame = make("div", { className: "blank" }, bar, steps);
  const place = make("b", {});
  const grip = make("button", { type: "button", className: "grip" }, "Move");
  const earlier = make("button", { type: "button", "aria-label": `Move image ${name} earlier` }, "←");
  const later = make("button", { type: "button", "aria-label": `Move image ${name} later` }, "→");
  const moves = make("div", { className: "moves", hidden: true }, earlier, grip, later);
  const item = make("li", { className: "image" }, frame, make("div", { className: "place" }, place, make("span", { className: "muted" }, `Image ${name}`)), moves);
  Object.assign(item, { named: name, prompt, frame, bar, steps, place, grip, earlier, later, moves, content: null });
  earlier.addEventListener("click", () => move(item, listed().indexOf(item) - 1));
  later.addEventListener("click", () => move(item, listed().indexOf(item) + 1));
  item.addEventListener("keydown", (event) => byKey(event, item));
  item.addEventListener("pointerdown", (event) => drag(event, item));
  return item;
}

function progressed(item, event) {
  item.bar.max = event.of;
  item.bar.value = event.step;
  item.steps.textContent = `step ${event.step} of ${event.of}`;
}

function completed(item, content) {
  const image = make("img", { alt: `Image ${item.named} for: ${item.prompt}`, draggable: false });
  image.addEventListener("load", () => image.classList.toggle("coarse", image.naturalWidth < 128));
  image.src = `data:image/png;base64,${content}`;
  item.frame.replaceWith(image);
  item.content = content;
}

async function draw(event) {
  event.preventDefault();
  const prompt = $("image-prompt").value;
  if (!prompt.trim()) {
    problem($("draw-problem"), "Write what shall be drawn first.", $("image-prompt"));
    $("image-prompt").focus();
    return;
  }
  problem($("draw-problem"), "", $("image-prompt"));
  problem($("rank-problem"), "");
  $("rank-said").textContent = "";
  state.drawing?.abort();
  const stop = new AbortController();
  state.drawing = stop;
  const model = $("image-model").value;
  const user = person();
  const body = { model, prompt, n: DRAWN, stream: true };
  if (user && $("image-model").models.get(model)?.personal) body.user = user;
  const items = Array.from({ length: DRAWN }, (_, index) => imageOf(index, prompt));
  $("images").replaceChildren(...items);
  $("ranking").hidden = false;
  $("rank").hidden = true;
  $("draw-stop").hidden = false;
  say("Four images are being drawn.", "draw-said");
  number();
  try {
    const found = await call(`${state.images}v1/images/generations`, { body, signal: stop.signal });
    for await (const one of events(found)) {
      if (one.type === "image_generation.progress") progressed(items[one.index], one);
      else if (one.type === "image_generation.completed") completed(items[one.index], one.b64_json);
    }
    const taste = found.headers.get("x-palate-personalization") === "personal" ? `, in ${user}'s taste` : "";
    if (state.drawing === stop) say(`Four images are there${taste}: put the best first.`, "draw-said");
  } catch (error) {
    if (state.drawing !== stop) return; // others are being drawn in their place
    if (error.name === "AbortError") say("Stopped.", "draw-said");
    else {
      say("", "draw-said");
      failed($("draw-problem"), error, $("image-prompt"));
    }
  } finally {
    if (state.drawing === stop) {
      state.drawing = null;
      state.drawn = { prompt, model };
      for (const item of items) if (item.content === null) item.remove();
      ready();
    }
  }
}

/** What was drawn can be moved, and sent. */
function ready() {
  const items = listed();
  for (const item of items) {
    item.moves.hidden = items.length < 2;
    item.classList.toggle("done", items.length > 1);
  }
  if (document.activeElement === $("draw-stop")) $("image-prompt").focus();
  $("draw-stop").hidden = true;
  $("rank").hidden = items.length < 2;
  $("ranking").hidden = items.length === 0;
  number();
}

/** Write each image's place on it. */
function number() {
  const items = listed();
  items.forEach((item, index) => {
    const end = index === 0 ? " · best" : index === items.length - 1 ? " · last" : "";
    item.place.textContent = `${index + 1}${end}`;
    item.grip.setAttribute("aria-label", `Move image ${item.named}, place ${index + 1} of ${items.length}, by the arrow keys`);
    item.earlier.setAttribute("aria-disabled", String(index === 0));
    item.later.setAttribute("aria-disabled", String(index === items.length - 1));
  });
}

/** Put an image at a place. The others are moved around it, so that it keeps focus and pointer. */
function arrange(item, place) {
  const others = listed().filter((one) => one !== item);
  others.forEach((one, index) => (index < place ? item.before(one) : $("images").append(one)));
  number();
}

function announce(item) {
  const items = listed();
  $("moved").textContent = `Image ${item.named} is now at place ${items.indexOf(item) + 1} of ${items.length}.`;
  $("rank-said").textContent = "";
}

function move(item, place) {
  if (place < 0 || place >= listed().length) return;
  arrange(item, place);
  announce(item);
  item.scrollIntoView({ block: "nearest" });
}

function byKey(event, item) {
  if (!item.classList.contains("done") || event.altKey || event.ctrlKey || event.metaKey) return;
  const items = listed();
  const here = items.indexOf(item);
  const to = { ArrowLeft: here - 1, ArrowUp: here - 1, ArrowRight: here + 1, ArrowDown: here + 1, Home: 0, End: items.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  move(item, to);
}

/** Drag an image: by a mouse anywhere on it, by a finger at its handle, so that the page can still be scrolled. */
function drag(event, item) {
  const grip = event.target.closest("button");
  if (event.button !== 0 || !item.classList.contains("done") || (grip && grip !== item.grip)) return;
  if (event.pointerType !== "mouse" && grip !== item.grip) return;
  const before = listed();
  let [x, y] = [event.clientX, event.clientY];
  const home = () => {
    item.style.transform = "";
    const box = item.getBoundingClientRect();
    return [box.left, box.top];
  };
  const over = (found) => listed().find((one) => {
    const box = one.getBoundingClientRect();
    return one !== item && found.clientX > box.left && found.clientX < box.right && found.clientY > box.top && found.clientY < box.bottom;
  });
  const onMove = (found) => {
    if (found.pointerId !== event.pointerId) return;
    item.classList.add("dragged");
    const other = over(found);
    if (other) {
      const [left, top] = home();
      arrange(item, listed().indexOf(other));
      const [newLeft, newTop] = home();
      x += newLeft - left;
      y += newTop - top;
    }
    item.style.transform = `translate(${found.clientX - x}px, ${found.clientY - y}px)`;
  };
  const onEnd = (found) => {
    if (found.pointerId !== event.pointerId) return;
    item.removeEventListener("pointermove", onMove);
    item.removeEventListener("pointerup", onEnd);
    item.removeEventListener("pointercancel", onEnd);
    item.style.transform = "";
    item.classList.remove("dragged");
    if (found.type === "pointercancel") arrange(item, before.indexOf(item));
    else if (listed().some((one, index) => one !== before[index])) announce(item);
  };
  item.setPointerCapture(event.pointerId);
  item.addEventListener("pointermove", onMove);
  item.addEventListener("pointerup", onEnd);
  item.addEventListener("pointercancel", onEnd);
}

async function rank() {
  const user = person();
  const field = $("person-choice").hidden || $("person").value === NEW ? $("person-id") : $("person");
  $("rank-said").textContent = "";
  problem($("rank-problem"), "");
  if (user === null) {
    problem($("rank-problem"), "Whose order is it? Choose a person above first.");
    field.focus();
    return;
  }
  if ($("rank").getAttribute("aria-disabled") === "true") return;
  $("rank").setAttribute("aria-disabled", "true");
  const items = listed();
  const images = items.map((item) => ({ b64_json: item.content }));
  try {
    await call(`${state.images}v1/feedback`, { body: { user, ...state.drawn, images } });
    $("rank-said").textContent = `Stored: ${user} likes ${items.map((item) => item.named).join(", then ")}.`;
  } catch (error) {
    failed($("rank-problem"), error);
  } finally {
    $("rank").removeAttribute("aria-disabled");
  }
}

// What a person does

$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const given = $("key").value.trim();
  if (/[^\x21-\x7e]/.test(given)) { // no header can hold it
    askForKey("This cannot be a key: it has spaces, or letters beyond ASCII.");
    return;
  }
  state.key = given;
  if (await connect()) {
    if (state.key) sessionStorage.setItem(KEY, state.key);
    $("key").value = "";
    $("main").focus();
  }
});

$("forget").addEventListener("click", async () => {
  sessionStorage.removeItem(KEY);
  location.reload(); // answers and images leave the page with the key
});

$("person").addEventListener("change", async () => {
  await showPerson();
  if ($("person").value === NEW) $("person-id").focus();
});
$("person-id").addEventListener("change", showPerson);
$("ask-form").addEventListener("submit", ask);
$("ask-stop").addEventListener("click", () => { for (const one of state.asking) one.stop?.abort(); });
$("text-model").addEventListener("change", followModel);
$("beta").addEventListener("input", reask);
$("draw-form").addEventListener("submit", draw);
$("draw-stop").addEventListener("click", () => state.drawing?.abort());
$("rank").addEventListener("click", rank);
for (const [field, form] of [["prompt", "ask-form"], ["image-prompt", "draw-form"]]) {
  $(field).addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $(form).requestSubmit();
  });
}

connect();
