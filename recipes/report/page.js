// The page: which curves stand in which panel, and the controls that all charts share.

// names: columns of a step's line, and of an evaluation's after "eval/FOLDER/"; kind: how values are written; log: "off" or "on"
// at first where a logarithmic scale makes sense; zero: the scale begins at 0.
const PANELS = [
  { group: "Training", title: "Loss", unit: "nats a trained token", names: ["loss"], log: "off", smooth: true, wide: true },
  { group: "Training", title: "Reward margin", unit: "chosen minus rejected", names: ["rewards/margins"], smooth: true },
  { group: "Training", title: "Accuracy", unit: "pairs with the chosen answer ahead", names: ["rewards/accuracies"], kind: "share", smooth: true },
  { group: "Training", title: "Rewards", unit: "against the reference", names: ["rewards/chosen", "rewards/rejected"], smooth: true },
  { group: "Training", title: "Log-probabilities", unit: "nats an answer", names: ["logps/chosen", "logps/rejected"], smooth: true },
  { group: "Training", title: "Learning rate", unit: "", names: ["learning_rate"], log: "off", zero: true },
  { group: "Training", title: "Gradient norm", unit: "before clipping", names: ["gradient_norm"], log: "off", smooth: true },
  { group: "Speed and memory", title: "Speed", unit: "tokens a second", names: ["tokens_per_second", "trained_tokens_per_second", "tokens_per_second_per_gpu"], zero: true },
  { group: "Speed and memory", title: "Memory against plan", unit: "GiB at the peak so far", names: ["memory_reserved_gib", "memory_allocated_gib", "memory_peak_rss_gib", "memory_planned_gib"], zero: true },
  { group: "Speed and memory", title: "Share of the ceiling", unit: "", names: ["of_ceiling", "mfu", "hfu"], kind: "share", zero: true },
  { group: "Speed and memory", title: "Time of a step", unit: "seconds", names: ["step_seconds", "step_seconds_p50", "step_seconds_p95"], log: "off", zero: true },
  { group: "Speed and memory", title: "Time lost", unit: "seconds", names: ["data_wait_seconds", "rank_wait_seconds", "checkpoint_blocked_seconds"], zero: true },
  { group: "Speed and memory", title: "Size of a step", unit: "tokens", names: ["tokens", "tokens_saved"], zero: true },
];
const LABELS = {
  loss: "training", "rewards/margins": "training", "rewards/accuracies": "training", tokens_per_second: "all tokens", trained_tokens_per_second: "trained tokens",
  tokens_per_second_per_gpu: "a GPU", memory_allocated_gib: "allocated", memory_reserved_gib: "reserved", memory_peak_rss_gib: "process",
  memory_planned_gib: "planned", of_ceiling: "measured ceiling", mfu: "published peak (MFU)", hfu: "with recomputation (HFU)", step_seconds: "mean",
  step_seconds_p50: "median of 100", step_seconds_p95: "95 % of 100 below", data_wait_seconds: "for data, a step", rank_wait_seconds: "for ranks, a step",
  checkpoint_blocked_seconds: "for checkpoints", tokens: "computed", tokens_saved: "saved by shared prompts",
};
const AXES = { step: "Steps", tokens: "Tokens", seconds: "Time" };
const PLAIN = new Set(["step", "skipped"]);
const LOOKS = { memory_planned_gib: { dash: 2 } };

const at = (id) => document.getElementById(id);
const runs = JSON.parse(at("data").textContent).runs;
const probe = make("span", { className: "hidden", "aria-hidden": "true" });
let colors = {};

const view = {
  axis: "step", extent: [0, 1], range: null, half: 0, cursor: null, active: null, hidden: new Set(), runs: runs.length, charts: [],
  name: (run) => runs[run].name,
  say: (text) => { at("said").textContent = text; },
  /** A place on the x axis in words. */
  text: (value, axis = view.axis) => ({ step: () => `step ${wholeText(value)}`, tokens: () => `${wholeText(value)} tokens`, seconds: () => secondsText(value, value < 60 ? 0.1 : 1) })[axis](),
  color: (number) => view.paint(`--curve-${number % 6}`),
  /** The colour that a style names, for a canvas. */
  paint: (name) => (colors[name] ??= ((probe.style.color = `var(${name})`), getComputedStyle(probe).color)),
  draw() {
    const ends = view.charts.flatMap((chart) => chart.shown()).flatMap((curve) => [curve.x[view.axis][0], curve.x[view.axis].at(-1)]);
    const [low, high] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, 1];
    view.extent = [low, Math.max(high, low + 1e-6, view.axis === "step" ? low + 1 : 0)];
    for (const chart of view.charts) chart.draw();
  },
  point(chart, value) {
    Object.assign(view, { active: value === null ? null : chart, cursor: value });
    view.waiting ??= requestAnimationFrame(() => {
      view.waiting = null;
      for (const other of view.charts) other.point();
    });
  },
  /** Show a part of the x axis; without arguments all of it. */
  zoom(from, to) {
    const [low, high] = view.extent;
    const all = from === undefined || (from <= low && to >= high);
    if (!all && !(to - from > (high - low) * 1e-5)) return;
    view.range = all ? null : [Math.max(from, low), Math.min(to, high)];
    at("reset").disabled = all;
    view.draw();
  },
};

/** How often the colours were used up before a run; its dashes tell it apart. */
const again = (run) => Math.floor(run / 6);

/** The curves of a table's column in all runs, with their colours: those of the runs, or of the column where there is one run. */
function curvesOf(kind, name, label, number, look = {}) {
  return runs.flatMap((run, index) => {
    const column = run[kind]?.columns[name];
    if (!column) return [];
    const own = runs.length > 1 ? { color: index, dash: number + again(index) } : { color: number, dash: 0 };
    return [{ run: index, label, x: run[kind].x, group: run[kind].group, ...column, low: column.low ?? null, high: column.high ?? null, ...own, ...look }];
  });
}

const same = (one, other) => one.run === other.run && one.mean.length === other.mean.length && one.mean.every((value, index) => value === other.mean[index]);

function panels() {
  const own = new Set(runs.flatMap((run) => Object.keys(run.steps?.columns ?? {})).filter((name) => !PLAIN.has(name)));
  const evaluated = new Set(runs.flatMap((run) => Object.keys(run.evaluations?.columns ?? {})).filter((name) => !PLAIN.has(name)));
  const folders = new Set([...evaluated].filter((name) => name.startsWith("eval/")).map((name) => name.split("/")[1]));
  const found = [], pairs = [...own].some((name) => name.startsWith("rewards/"));
  for (const panel of PANELS) {
    const curves = [];
    let number = 0;
    for (const name of panel.names) {
      const more = curvesOf("steps", name, LABELS[name] ?? name.split("/").at(-1).replaceAll("_", " "), number, { smooth: panel.smooth, ...LOOKS[name] }).filter((curve) => !curves.some((other) => same(other, curve)));
      number += more.length > 0;
      curves.push(...more);
      own.delete(name);
      for (const full of evaluated) {
        const [kind, folder, ...rest] = full.split("/");
        if (kind !== "eval" || rest.join("/") !== name) continue;
        const suffix = panel.names.length > 1 ? `, ${name.split("/").at(-1)}` : "";
        curves.push(...curvesOf("evaluations", full, `held-out${folders.size > 1 ? ` ${folder}` : ""}${suffix}`, number++, { dots: true }));
        evaluated.delete(full);
      }
    }
    if (curves.length) found.push({ kind: "number", ...panel, curves });
  }
  for (const name of own) found.push({ group: "Other values", title: name, unit: "", kind: "number", smooth: true, curves: curvesOf("steps", name, name, 0, { smooth: true }) });
  const scores = [...evaluated].filter((name) => name.startsWith("scores/"));
  const scored = (name, number) => curvesOf("evaluations", name, name.slice("scores/".length).replaceAll("/", " "), number, { dots: true });
  if (scores.length && runs.length === 1) found.push({ group: "Scores", title: "Scores", unit: "at each evaluation", kind: "number", wide: true, curves: scores.flatMap(scored) });
  else for (const name of scores) found.push({ group: "Scores", title: name.slice("scores/".length), unit: "", kind: "number", curves: scored(name, 0) });
  for (const name of evaluated) if (!scores.includes(name)) found.push({ group: "Other values", title: name, unit: "held-out", kind: "number", curves: curvesOf("evaluations", name, name, 0, { dots: true }) });
  for (const panel of found) {
    panel.single = new Set(panel.curves.map((curve) => curve.label)).size === 1;
    if (panel.title === "Loss") Object.assign(panel, { marks: marks(), unit: pairs ? "mean over pairs" : panel.unit });
    if (panel.title === "Gradient norm") panel.level = clipping();
    if (panel.log && panel.smooth && outlying(panel.curves)) panel.log = "on";
  }
  return found;
}

/** Whether the largest value of the curves leaves no room for the others on a linear scale. */
function outlying(curves) {
  const heights = curves.flatMap((curve) => curve.high ?? curve.mean).filter((value) => value !== null).sort((a, b) => a - b);
  return heights[0] > 0 && heights.at(-1) > 20 * heights[heights.length >> 1];
}

function clipping() {
  const norms = [...new Set(runs.map((run) => Number(run.settings["optimizer.clip_norm"])))];
  return norms.length === 1 && norms[0] > 0 ? { value: norms[0], label: `clipped at ${norms[0]}` } : undefined;
}

function marks() {
  return runs.flatMap((run, index) => {
    const color = runs.length > 1 ? index : null, spiked = new Set(run.spikes.map((spike) => spike.at.step));
    const noted = run.spikes.map(({ at, deviations }) => ({ run: index, at, color, label: deviations === null ? "loss or gradient not finite" : `spike, ${valueText(deviations)} deviations above the median` }));
    return [...noted, ...run.gaps.filter((gap) => !spiked.has(gap.step)).map((gap) => ({ run: index, at: gap, color, label: "loss not finite" }))];
  });
}

function part(title, id, content, place) {
  place.append(make("section", { id, "aria-labelledby": `${id}-title` }, make("h2", { id: `${id}-title`, textContent: title }), content));
  at("nav").append(make("a", { href: `#${id}`, textContent: title }));
}

function fill() {
  document.body.append(probe);
  at("title").textContent = runs.length > 1 ? `${runs.length} runs compared` : runs[0].name;
  at("facts").append(factsOf(runs));
  for (const run of runs) for (const note of run.notes) at("notes").append(make("li", { textContent: runs.length > 1 ? `${run.name}: ${note}` : note }));
  const all = panels();
  for (const group of new Set(all.map((panel) => panel.group))) {
    const charts = all.filter((panel) => panel.group === group).map((panel) => new Chart(view, panel));
    view.charts.push(...charts);
    // No row has a hole: three in a row, or two and the last one alone.
    const narrow = charts.filter((chart) => !chart.panel.wide).length;
    if (narrow % 3 && narrow % 2) charts.at(-1).element.classList.add("last");
    const grid = make("div", { className: narrow % 3 ? "grid" : "grid three" }, ...charts.map((chart) => chart.element));
    part(group, group.toLowerCase().replaceAll(" ", "-"), grid, at("curves"));
  }
  at("controls").hidden = at("help").hidden = !all.length;
  const missing = PANELS.filter((panel) => !panel.names[0].includes("/") && !all.some((other) => other.title === panel.title)).map((panel) => panel.title.toLowerCase());
  if (all.length && missing.length) at("notes").append(make("li", { textContent: `not measured: ${missing.join(", ")}` }));
  const below = at("parts");
  if (runs.some((run) => run.spikes.length)) part("Spikes", "spikes", spikesOf(runs, show), below);
  if (runs.some((run) => run.samples.length)) part("Samples", "samples", samplesOf(runs), below);
  if (runs.some((run) => run.evaluations)) part("Evaluations", "evaluations", evaluationsOf(runs), below);
  if (runs.some((run) => Object.keys(run.settings).length)) part("Settings", "settings", settingsOf(runs), below);
}

/** Zoom to a step's neighbourhood. */
function show(place) {
  const value = place[view.axis] ?? 0, wide = (view.extent[1] - view.extent[0]) / 20;
  view.zoom(value - wide, value + wide);
  view.point(view.charts[0], value);
  view.charts[0].element.scrollIntoView({ block: "center" });
}

function controls() {
  const axes = Object.keys(AXES).filter((axis) => runs.every((run) => !run.steps || run.steps.x[axis]));
  for (const axis of axes) {
    const input = make("input", { type: "radio", name: "axis", value: axis, checked: axis === view.axis });
    input.addEventListener("change", () => {
      Object.assign(view, { axis, cursor: null, range: null });
      view.zoom();
    });
    at("axes").append(make("label", {}, input, AXES[axis]));
  }
  // The slider goes up to a tenth of the longest run, finely where it is small.
  const steps = Math.max(1, ...runs.map((run) => run.steps?.x.step.at(-1) ?? 1)), slider = at("smoothing");
  const soften = () => {
    view.half = slider.value === "0" ? 0 : Math.max(1, (steps / 10) * (slider.value / 100) ** 2);
    at("smoothed").textContent = view.half ? `half after ${view.half < 10 ? view.half.toFixed(1) : wholeText(view.half)} steps` : "none";
    slider.setAttribute("aria-valuetext", at("smoothed").textContent);
    view.draw();
  };
  slider.value = steps >= 100 ? 30 : 0;
  slider.addEventListener("input", soften);
  at("reset").addEventListener("click", () => view.zoom());
  if (runs.length > 1) {
    runs.forEach((run, index) => {
      const button = make("button", { type: "button", "aria-pressed": "true", title: "Show or hide" }, swatch(view, { color: index, dash: again(index) }), run.name);
      button.addEventListener("click", () => {
        const hide = !view.hidden.has(index);
        view.hidden[hide ? "add" : "delete"](index);
        button.setAttribute("aria-pressed", !hide);
        view.draw();
      });
      at("runs").append(button);
    });
  }
  soften();
}

function theme() {
  const button = at("theme"), dark = window.matchMedia("(prefers-color-scheme: dark)"), root = document.documentElement;
  const stored = (value) => {
    // A browser may refuse storage to a file.
    try { return value ? localStorage.setItem("komainu-theme", value) : localStorage.getItem("komainu-theme"); } catch { return null; }
  };
  const now = () => root.dataset.theme ?? (dark.matches ? "dark" : "light");
  const apply = () => {
    colors = {};
    button.textContent = now() === "dark" ? "☀ Light" : "☾ Dark";
    view.draw();
  };
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  button.addEventListener("click", () => {
    root.dataset.theme = now() === "dark" ? "light" : "dark";
    stored(root.dataset.theme);
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
  window.addEventListener(event, () => {
    view.printing = printing;
    view.draw();
  });
}
fill();
controls();
theme();
