// The parts of the page below the curves: spikes, samples, evaluations, settings; and the facts above them.

function table(head, rows, kinds = []) {
  const cell = (name, value, column) => {
    const element = make(name, { className: kinds[column] ?? "" });
    element.append(...(Array.isArray(value) ? value : [value ?? "–"]));
    return element;
  };
  const headings = make("thead", {}, make("tr", {}, ...head.map((name, column) => Object.assign(cell("th", name, column), { scope: "col" }))));
  const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value, column) => (column ? cell("td", value, column) : Object.assign(cell("th", value, column), { scope: "row" }))))));
  return make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Table" }, make("table", {}, headings, body));
}

/** A part that opens; its content is made when it opens first. */
function folded(name, content, open = false) {
  const element = make("details", {}, make("summary", { textContent: name }));
  element.addEventListener("toggle", () => {
    if (element.open && element.childElementCount === 1) element.append(content());
  });
  element.open = open;
  return element;
}

function factsOf(runs) {
  if (runs.length === 1) {
    const tile = ([name, value, remark]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }), ...(remark ? [make("dd", { className: "remark", textContent: remark })] : []));
    return make("dl", { className: "facts" }, ...runs[0].facts.map(tile));
  }
  // A fact that a run has several times, such as a loss for each held-out set, is a row for each.
  const numbered = runs.map((run) => {
    const counts = {};
    return new Map(run.facts.map((fact) => [`${fact[0]} ${(counts[fact[0]] = (counts[fact[0]] ?? 0) + 1)}`, fact]));
  });
  const keys = [...new Set(numbered.flatMap((facts) => [...facts.keys()]))];
  const value = (fact) => (fact ? [fact[1], ...(fact[2] ? [make("small", { textContent: fact[2] })] : [])] : "–");
  const rows = keys.map((key) => [numbered.find((facts) => facts.has(key)).get(key)[0], ...numbered.map((facts) => value(facts.get(key)))]);
  return table(["", ...runs.map((run) => run.name)], rows, ["", ...runs.map(() => "fact")]);
}

function spikesOf(runs, show) {
  const rows = [], several = runs.length > 1;
  const shown = (value) => (value === null ? "not finite" : valueText(value));
  for (const run of runs) {
    for (const spike of run.spikes) {
      const button = make("button", { type: "button", textContent: "show", "aria-label": `Show step ${spike.at.step} in the curves` });
      button.addEventListener("click", () => show(spike.at));
      const documents = spike.count ? folded(`${wholeText(spike.count)}`, () => documentsOf(spike)) : "–";
      rows.push([wholeText(spike.at.step), ...(several ? [run.name] : []), shown(spike.loss), spike.median === null ? "–" : valueText(spike.median), spike.deviations === null ? "–" : valueText(spike.deviations), shown(spike.gradient_norm), [documents], [button]]);
    }
  }
  const kinds = ["number", ...(several ? ["name"] : []), "number", "number", "number", "number", "text", "number"];
  return make("div", {},
    make("p", { className: "quiet", textContent: "Steps whose loss was not finite or stood far above the steps before (guard.spike deviations), with the documents that they trained on. The run's own command with --replay STEP runs such a step again." }),
    table(["step", ...(several ? ["run"] : []), "loss", "median before", "deviations above", "gradient norm", "documents", ""], rows, kinds));
}

function documentsOf(spike) {
  const rows = [];
  for (const [source, documents] of Object.entries(spike.documents)) {
    for (const [number, start, tokens] of documents) rows.push([wholeText(number ?? NaN), source, start === null ? "–" : wholeText(start), Array.isArray(tokens) ? tokens.map(wholeText).join(" + ") : wholeText(tokens ?? NaN)]);
  }
  const shown = make("div", { className: "documents" }, table(["number", "source", "first token", "tokens"], rows, ["number", "text", "number", "number"]));
  if (spike.more) shown.append(make("p", { className: "quiet", textContent: `${wholeText(spike.more)} more are in spikes.jsonl` }));
  return shown;
}

function samplesOf(runs) {
  const steps = [...new Set(runs.flatMap((run) => run.samples.flatMap(({ answers }) => answers.map(([step]) => step))))].sort((a, b) => a - b);
  const prompts = [...new Set(runs.flatMap((run) => run.samples.map(({ prompt }) => prompt)))];
  const given = runs.map((run) => new Map(run.samples.map(({ prompt, answers }) => [prompt, answers])));
  const slider = make("input", { type: "range", min: 0, max: steps.length - 1, value: steps.length - 1, "aria-label": "Evaluation" });
  const output = make("output");
  const answer = (run, step, text) => make("div", {}, make("span", { className: "quiet", textContent: `${runs.length > 1 ? `${runs[run].name}, ` : ""}step ${wholeText(step)}` }), make("p", { className: "says", textContent: text || "(empty)" }));
  const cards = prompts.map((prompt) => {
    const answers = make("div", { className: "answers" });
    const all = folded("every evaluation", () => make("div", { className: "answers" }, ...steps.flatMap((step) => given.flatMap((mine, run) => (mine.get(prompt) ?? []).filter(([at]) => at === step).map(([at, text]) => answer(run, at, text))))));
    const card = make("div", { className: "card sample" }, make("p", { className: "says prompt", textContent: prompt, tabIndex: 0 }), answers, ...(steps.length > 1 ? [all] : []));
    return { card, update: (step) => answers.replaceChildren(...given.flatMap((mine, run) => {
      // A run that was not evaluated at this step shows its last answer before it.
      const last = (mine.get(prompt) ?? []).filter(([at]) => at <= step).at(-1);
      return last ? [answer(run, ...last)] : [];
    })) };
  });
  const update = () => {
    const step = steps[slider.value];
    output.textContent = `step ${wholeText(step)}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    for (const card of cards) card.update(step);
  };
  slider.addEventListener("input", update);
  update();
  const stepper = make("div", { className: "stepper" }, make("label", { className: "stepper" }, "Answers at", output), slider);
  return make("div", {}, ...(steps.length > 1 ? [stepper] : []), ...cards.map(({ card }) => card));
}

function evaluationsOf(runs) {
  return make("div", {}, ...runs.filter((run) => run.evaluations).map((run, _, shown) => folded(`${shown.length > 1 ? `${run.name}: ` : ""}values of every evaluation`, () => {
    const { x, columns } = run.evaluations, names = Object.keys(columns);
    const rows = x.step.map((step, row) => [wholeText(step), ...names.map((name) => (columns[name].mean[row] === null ? "–" : valueText(columns[name].mean[row])))]);
    return table(["step", ...names.map((name) => name.replace(/^(eval|scores)\//, ""))], rows, ["number", ...names.map(() => "number")]);
  })));
}

function settingsOf(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const rows = (chosen) => chosen.map((name) => [name, ...runs.map((run) => run.settings[name])]);
  const head = ["setting", ...runs.map((run) => run.name)], kinds = ["", ...runs.map(() => "text")];
  const all = () => {
    const find = make("input", { type: "search", id: "find", placeholder: "find a setting", "aria-label": "Find a setting" }), place = make("div", {}, table(head, rows(names), kinds));
    find.addEventListener("input", () => place.replaceChildren(table(head, rows(names.filter((name) => name.toLowerCase().includes(find.value.trim().toLowerCase()))), kinds)));
    return make("div", {}, find, place);
  };
  if (runs.length === 1) return make("div", {}, folded(`${names.length} settings`, all));
  const different = names.filter((name) => new Set(runs.map((run) => run.settings[name])).size > 1);
  const shown = different.length ? table(head, rows(different), kinds) : make("p", { textContent: "All settings are equal." });
  return make("div", {}, make("h3", { textContent: "Settings that differ" }), shown, folded(`all ${names.length} settings`, all));
}
