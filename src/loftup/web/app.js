import {
  attention, colours, enlarge, glow, heat, lengths, principalComponents, project, ranges, similarity,
} from "./features.js";

const get = (id) => document.getElementById(id);
const [photo, bilinear, dense] = ["photo", "bilinear", "dense"].map(get);
const show = { status: get("status"), progress: get("progress") };
let ort;
let site;
let sessions;
let processor; // that the sessions run on, in words
let current = null; // what is shown: the features of a picture and what was derived from them
let kept = null; // the point that was clicked: {x, y}
let job = 0; // pictures that were begun: an older one's result is dropped

function say(text, percent = null, failed = false) {
  show.status.textContent = text;
  show.status.classList.toggle("error", failed);
  show.progress.hidden = percent === null;
  if (percent !== null) show.progress.value = percent;
}

const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

async function download(path, from, to) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path} is missing (HTTP ${answer.status}); build the page again: loftup web`);
  const total = Number(answer.headers.get("Content-Length")) || 0;
  const parts = [];
  let received = 0;
  const reader = answer.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    received += part.value.length;
    say(`Loading the models: ${(received / 1e6).toFixed(1)} MB`, total ? from + ((to - from) * received) / total : from);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

// Whether to compute on a GPU: where there is a real one, or as the address says by ?processor=gpu or =cpu.
async function gpu() {
  const asked = new URLSearchParams(location.search).get("processor");
  const adapter = asked === "cpu" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  return Boolean(adapter) && (asked === "gpu" || !adapter.info?.isFallbackAdapter);
}

async function start(kind, models) {
  ort = await import(`./runtime/ort.${kind}.min.mjs`);
  ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  const options = { executionProviders: [kind], logSeverityLevel: 3 }; // errors alone
  sessions = {};
  for (const [name, model] of Object.entries(models)) {
    sessions[name] = await ort.InferenceSession.create(model, options);
  }
  const side = 4 * site.multiple;
  const image = new ort.Tensor("float32", new Float32Array(3 * side * side), [1, 3, side, side]);
  const { features } = await sessions.backbone.run({ image }); // a trial, which also compiles
  await sessions.upsampler.run({ features, image });
  processor = kind === "webgpu" ? "the GPU (WebGPU)" : "the CPU";
}

async function load() {
  site = await (await fetch("site.json")).json();
  const models = {
    backbone: await download("models/backbone.onnx", 0, 70),
    upsampler: await download("models/upsampler.onnx", 70, 80),
  };
  say("Starting the runtime", 85);
  const kind = (await gpu()) ? "webgpu" : "wasm";
  try {
    await start(kind, models);
  } catch (error) {
    if (kind === "wasm") throw error;
    console.warn(`WebGPU: ${error.message}`);
    await start("wasm", models);
    processor += ", as the GPU failed";
  }
  site.samples.forEach((sample, index) => {
    const button = document.createElement("button");
    const image = document.createElement("img");
    Object.assign(button, { type: "button", title: sample.credit });
    Object.assign(image, { src: sample.file, alt: sample.name });
    button.append(image);
    button.addEventListener("click", () => take(sample.file, button));
    get("samples").append(button);
    if (index === 0) button.id = "first";
  });
  get("credits").textContent = `Sample pictures: ${site.samples.map((sample) => sample.credit).join("; ")}.`;
}

// The picture in the canvas, its sides multiples of the backbone's, as pixels and as a normalised tensor.
function prepare(picture) {
  const { multiple, mean, std } = site;
  const longest = Number(get("side").value);
  const scale = Math.min(longest / Math.max(picture.width, picture.height), 1);
  const [width, height] = [picture.width, picture.height].map(
    (side) => Math.max(2, Math.round((side * scale) / multiple)) * multiple,
  );
  Object.assign(photo, { width, height });
  const context = photo.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const values = new Float32Array(3 * width * height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) values[c * width * height + i] = (pixels.data[4 * i + c] / 255 - mean[c]) / std[c];
  }
  return { width, height, pixels, image: new ort.Tensor("float32", values, [1, 3, height, width]) };
}

async function run(picture, mine) {
  current = kept = null; // the pointer has nothing to compare until it is done
  get("result").hidden = false;
  const { width, height, pixels, image } = prepare(picture);
  say("Computing the backbone's features", 90);
  await painted();
  const started = performance.now();
  const { features } = await sessions.backbone.run({ image });
  const [, channels, h, w] = features.dims;
  say("Upsampling", 95);
  await painted();
  const { upsampled } = await sessions.upsampler.run({ features, image });
  if (mine !== job) return;
  const seconds = (performance.now() - started) / 1000;
  const cells = h * w;
  const basis = principalComponents(features.data, channels, cells);
  const low = project(features.data, channels, cells, basis);
  const limits = ranges(low, cells);
  current = {
    width, height, channels, h, w, pixels, limits, low,
    features: features.data,
    dense: upsampled.data,
    components: project(upsampled.data, channels, width * height, basis),
    norms: lengths(upsampled.data, channels, width * height),
    lowNorms: lengths(features.data, channels, cells),
  };
  for (const canvas of [bilinear, dense]) Object.assign(canvas, { width, height });
  drawComponents();
  say(`${width} × ${height} pixels from ${w} × ${h} feature vectors in ${seconds.toFixed(1)} s on ${processor}`);
}

function put(canvas, pixels) {
  canvas.getContext("2d").putImageData(new ImageData(pixels, current.width, current.height), 0, 0);
}

function drawComponents() {
  const { width, height, h, w, low, limits, components } = current;
  put(dense, colours(components, width * height, limits));
  put(bilinear, colours(enlarge(low, 3, [h, w], [height, width]), width * height, limits));
  get("caption").textContent = "The first three principal components as colours, in one range on both sides.";
  mark(null);
}

// The photograph with a point; of a point that was clicked also the cells that it looks at.
function mark(point) {
  const context = photo.getContext("2d");
  context.putImageData(current.pixels, 0, 0);
  get("looks").textContent = "Move over the picture to compare a point with all others; click to keep it.";
  if (!point) return;
  if (point === kept) {
    put(photo, glow(current.pixels.data, [current.height, current.width], looksAt(point.x, point.y), [current.h, current.w]));
    get("looks").textContent = "In orange the features that this pixel is a mean of: the brighter, the more.";
  }
  const radius = Math.max(1.5, current.width / 200);
  for (const [more, colour] of [[1, "#000"], [0, "#fff"]]) {
    context.fillStyle = colour;
    context.beginPath();
    context.arc(point.x + 0.5, point.y + 0.5, radius + more, 0, 2 * Math.PI);
    context.fill();
  }
}

// How a pixel weighs the features: (h, w).
function looksAt(x, y) {
  const { width, height, channels, h, w, features } = current;
  return attention(features, channels, [h, w], current.dense, [height, width], { x, y }, site.radius);
}

// How alike all pixels are to one: from the upsampled features, and bilinearly from the cell that it lies in.
function compare(x, y) {
  const { width, height, channels, h, w, features, norms, lowNorms } = current;
  const sharp = similarity(current.dense, channels, width * height, norms, y * width + x);
  const cell = Math.floor(((y + 0.5) * h) / height) * w + Math.floor(((x + 0.5) * w) / width);
  const coarse = enlarge(similarity(features, channels, h * w, lowNorms, cell), 1, [h, w], [height, width]);
  return { sharp, coarse };
}

function drawPoint(point) {
  const { sharp, coarse } = compare(point.x, point.y);
  const low = coarse.reduce((least, value) => Math.min(least, value), 1);
  put(dense, heat(sharp, low));
  put(bilinear, heat(coarse, low));
  get("caption").textContent = `Similarity to the point at column ${point.x}, row ${point.y}: dark to bright.`;
  mark(point);
}

function placeOf(event) {
  const box = photo.getBoundingClientRect();
  const at = (value, start, length, count) => Math.min(Math.max(Math.floor(((value - start) / length) * count), 0), count - 1);
  return {
    x: at(event.clientX, box.left, box.width, current.width),
    y: at(event.clientY, box.top, box.height, current.height),
  };
}

let waiting = null; // the last place of the pointer, drawn once a frame
photo.addEventListener("pointermove", (event) => {
  if (!current || kept || event.pointerType === "touch") return;
  if (waiting === null) requestAnimationFrame(() => { const at = waiting; waiting = null; if (at && !kept) drawPoint(at); });
  waiting = placeOf(event);
});
photo.addEventListener("pointerleave", () => {
  waiting = null;
  if (current && !kept) drawComponents();
});
photo.addEventListener("click", (event) => {
  if (!current) return;
  kept = placeOf(event);
  drawPoint(kept);
});
photo.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!current) return;
  if (event.key === "Escape") {
    kept = null;
    drawComponents();
  } else if (steps[event.key]) {
    event.preventDefault();
    const far = event.shiftKey ? 1 : 8;
    const from = kept || { x: current.width >> 1, y: current.height >> 1 };
    kept = {
      x: Math.min(Math.max(from.x + far * steps[event.key][0], 0), current.width - 1),
      y: Math.min(Math.max(from.y + far * steps[event.key][1], 0), current.height - 1),
    };
    drawPoint(kept);
  }
});
get("components").addEventListener("click", () => {
  kept = null;
  if (current) drawComponents();
});
get("slider").addEventListener("input", (event) => {
  get("compare").style.setProperty("--border", `${event.target.value}%`);
});
get("save").addEventListener("click", () => {
  const link = document.createElement("a");
  Object.assign(link, { href: dense.toDataURL("image/png"), download: "loftup.png" });
  link.click();
});

let last = null; // the source that is shown, taken again at another size
async function take(source, button = null) {
  if (!sessions) return say("Still loading the models; choose the picture again in a moment");
  const mine = ++job;
  last = source;
  for (const each of get("samples").children) each.setAttribute("aria-pressed", String(each === button));
  try {
    const blob = typeof source === "string" ? await (await fetch(source)).blob() : source;
    const picture = await createImageBitmap(blob).catch(() => {
      throw new Error("this file is no picture that the browser can read; try a JPEG or PNG");
    });
    if (mine === job) await run(picture, mine);
  } catch (error) {
    if (mine !== job) return;
    const much = /memory|allocat/i.test(error.message) ? "; try a smaller side" : "";
    say(`That did not work: ${error.message}${much}`, null, true);
  }
}
get("file").addEventListener("change", (event) => event.target.files[0] && take(event.target.files[0]));
get("side").addEventListener("change", () => {
  const pressed = get("samples").querySelector('[aria-pressed="true"]');
  if (last) take(last, pressed);
});
for (const type of ["dragover", "drop", "dragleave"]) {
  addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", type === "dragover");
    if (type === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}

// For tests, and for the curious in the console.
globalThis.loftup = { get current() { return current; }, compare, looksAt };

try {
  if (innerWidth < 640) get("side").value = "224";
  await load();
  await take(site.samples[0].file, get("first"));
} catch (error) {
  say(`The page could not start: ${error.message}`, null, true);
}
