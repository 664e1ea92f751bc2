// A chart: curves on one canvas, and on a second one above it the crosshair, which all charts share.

const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [1, 5]];
const LINE = 1.6; // dots

/** An element with properties and children; text is never read as markup. */
function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) key in element ? (element[key] = value) : element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** The index of the value nearest to `at` in rising values. */
function nearest(values, at) {
  const after = firstAbove(values, at);
  if (after === 0) return 0;
  return after === values.length || at - values[after - 1] <= values[after] - at ? after - 1 : after;
}

/** How many of the rising values are at most `at`. */
function firstAbove(values, at) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= at) low = middle + 1; else high = middle;
  }
  return low;
}

/** The exponential mean of a curve; a value counts half after `steps` steps. Each point weighs as much as the steps it stands for. */
function smooth(steps, values, half) {
  let sum = 0, weight = 0, before = 0;
  return values.map((value, index) => {
    const passed = steps[index] - before;
    if (value === null) return null;
    before = steps[index];
    const kept = 2 ** (-passed / half);
    sum = sum * kept + value * (1 - kept);
    weight = weight * kept + 1 - kept;
    return sum / weight;
  });
}

/**
 * view: what all charts share: {axis, range, half, cursor, hidden, color(number), changed(), moved(), say(text), text(axis, value)}.
 * panel: {title, unit, kind, curves, level, wide, log, zero}. A curve: {run, label, x: {axis: values}, mean, low, high, group,
 * color, dash, dots, smooth}.
 */
class Chart {
  constructor(view, panel) {
    Object.assign(this, { view, panel, log: panel.log === "on", drag: null });
    const caption = make("figcaption", {}, make("h3", { textContent: panel.title }), make("span", { className: "quiet", textContent: panel.unit }));
    if (panel.log) {
      const button = make("button", { type: "button", textContent: "log", title: "Logarithmic scale", "aria-pressed": this.log, "aria-label": `Logarithmic scale: ${panel.title}` });
      button.addEventListener("click", () => {
        this.log = !this.log;
        button.setAttribute("aria-pressed", this.log);
        this.draw();
      });
      caption.append(button);
    }
    const keys = this.keys();
    if (keys.length) caption.append(make("span", { className: "keys" }, ...keys));
    this.below = make("canvas", { "aria-hidden": "true" });
    this.above = make("canvas", { tabIndex: 0, role: "img", "aria-roledescription": "chart", "aria-describedby": "help" });
    this.tip = make("div", { className: "tip", hidden: true });
    this.plot = make("div", { className: "plot" }, this.below, this.above, this.tip);
    this.element = make("figure", { className: panel.wide ? "panel wide" : "panel" }, caption, this.plot);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.plot);
    // Charts out of sight are drawn when they come near.
    new IntersectionObserver((seen) => {
      this.near = seen.at(-1).isIntersecting;
      if (this.near && this.stale) this.draw();
    }, { rootMargin: "300px" }).observe(this.plot);
  }

  /** What the lines of the panel mean. Several runs have their colours in the list of runs. */
  keys() {
    const { curves } = this.panel, several = this.view.runs > 1, seen = new Map();
    for (const curve of curves) if (!seen.has(curve.label)) seen.set(curve.label, curve);
    if (seen.size < 2) return [];
    return [...seen.values()].map((curve) => make("span", { className: "key" }, swatch(this.view, several ? { ...curve, color: null } : curve), curve.label));
  }

  shown() {
    return this.panel.curves.filter((curve) => !this.view.hidden.has(curve.run) && curve.x[this.view.axis]);
  }

  /** The part of a curve's points to draw: those in sight and one more on each side. */
  part(curve, [from, to]) {
    const x = curve.x[this.view.axis];
    return [Math.max(0, firstAbove(x, from) - 1), Math.min(x.length, firstAbove(x, to) + 1)];
  }

  heights(range) {
    let low = Infinity, high = -Infinity;
    for (const curve of this.shown()) {
      const x = curve.x[this.view.axis], [start, end] = this.part(curve, range);
      for (let index = start; index < end; index++) {
        if (curve.mean[index] === null) continue;
        // A line from a point out of sight counts from the edge on.
        const edge = x[index] < range[0] ? range[0] : x[index] > range[1] ? range[1] : x[index];
        const other = index + (edge > x[index]) - (edge < x[index]);
        if (edge !== x[index] && !(other < end && other >= start && curve.mean[other] !== null)) continue;
        const share = other === index ? 0 : (edge - x[index]) / (x[other] - x[index]);
        const at = (values) => values[index] + share * (values[other] - values[index]), bottom = at(curve.low ?? curve.mean);
        if (!this.log || bottom > 0) low = Math.min(low, bottom);
        high = Math.max(high, at(curve.high ?? curve.mean));
      }
    }
    if (!(low <= high) || (this.log && !(low > 0))) return this.log ? [1, 10] : [0, 1];
    if (this.log) return low === high ? [low / 2, high * 2] : [low * (low / high) ** 0.05, high * (high / low) ** 0.05];
    if (this.panel.zero) low = Math.min(0, low);
    const spare = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [this.panel.zero && low === 0 ? 0 : low - spare, high + spare];
  }

  draw() {
    const width = this.plot.clientWidth, height = this.plot.clientHeight;
    this.describe();
    this.stale = !this.near && !this.view.printing;
    if (this.stale || !width || !height) return;
    const paint = this.cleared(this.below, width, height);
    const range = this.view.range ?? this.view.extent, [low, high] = this.heights(range);
    const vertical = (this.log ? logAxis : linearAxis)(low, high, Math.max(3, height / 38), this.panel.kind);
    const labels = vertical.ticks.map(vertical.text);
    const left = Math.ceil(Math.max(24, ...labels.map((label) => paint.measureText(label).width))) + 10;
    this.box = { left, right: width - 10, top: this.panel.marks?.length ? 14 : 8, bottom: height - 24 };
    this.range = range;
    const { box } = this, scaled = this.log ? Math.log : (value) => value, bottom = scaled(low), size = scaled(high) - bottom;
    this.place = (value) => box.left + ((value - range[0]) / (range[1] - range[0])) * (box.right - box.left);
    this.level = (value) => box.bottom - ((scaled(value) - bottom) / size) * (box.bottom - box.top);
    this.grid(paint, vertical.ticks, labels);
    paint.save();
    paint.beginPath();
    // A dot at the edge stays whole.
    paint.rect(box.left - 4, box.top - 4, box.right - box.left + 8, box.bottom - box.top + 8);
    paint.clip();
    for (const curve of this.shown()) this.curve(paint, curve, range);
    if (this.panel.level && this.panel.level.value > low && this.panel.level.value < high) this.rule(paint, this.panel.level);
    paint.restore();
    for (const mark of this.panel.marks ?? []) this.mark(paint, mark);
    this.point();
  }

  cleared(canvas, width, height) {
    const dots = window.devicePixelRatio || 1, paint = canvas.getContext("2d"), size = [width * dots, height * dots].map(Math.round);
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    paint.setTransform(dots, 0, 0, dots, 0, 0);
    paint.clearRect(0, 0, width, height);
    paint.font = "12px system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif";
    return paint;
  }

  grid(paint, ticks, labels) {
    const { box, range, view } = this;
    paint.lineWidth = 1;
    paint.textBaseline = "middle";
    paint.textAlign = "right";
    ticks.forEach((tick, index) => {
      const y = Math.round(this.level(tick)) + 0.5;
      paint.strokeStyle = view.paint("--grid");
      line(paint, box.left, y, box.right, y);
      paint.fillStyle = view.paint("--quiet");
      paint.fillText(labels[index], box.left - 7, y);
    });
    const kind = view.axis === "seconds" ? "seconds" : "whole";
    const axis = linearAxis(range[0], range[1], Math.max(2, (box.right - box.left) / (kind === "seconds" ? 105 : 85)), kind);
    paint.textBaseline = "top";
    paint.textAlign = "right";
    const name = { step: "steps", tokens: "tokens", seconds: "" }[view.axis];
    paint.fillText(name, box.right, box.bottom + 8);
    const end = name ? box.right - paint.measureText(name).width - 8 : this.plot.clientWidth;
    let free = -Infinity;
    for (const tick of axis.ticks) {
      const x = this.place(tick), text = axis.text(tick), half = paint.measureText(text).width / 2;
      paint.strokeStyle = view.paint("--line");
      line(paint, Math.round(x) + 0.5, box.bottom, Math.round(x) + 0.5, box.bottom + 4);
      if (x - half < free || x + half > end) continue;
      free = x + half + 8;
      paint.textAlign = "center";
      paint.fillText(text, x, box.bottom + 8);
    }
    paint.strokeStyle = view.paint("--line");
    line(paint, box.left, box.bottom + 0.5, box.right, box.bottom + 0.5);
  }

  /** A level with its name, such as the norm at which gradients are clipped. */
  rule(paint, { value, label }) {
    const y = Math.round(this.level(value)) + 0.5;
    paint.strokeStyle = paint.fillStyle = this.view.paint("--quiet");
    paint.lineWidth = 1;
    paint.setLineDash([4, 4]);
    line(paint, this.box.left, y, this.box.right, y);
    paint.setLineDash([]);
    paint.textAlign = "right";
    paint.textBaseline = "bottom";
    // A rim keeps the words legible where a curve passes.
    Object.assign(paint, { lineWidth: 4, strokeStyle: this.view.paint("--card") });
    paint.strokeText(label, this.box.right - 4, y - 2);
    paint.fillText(label, this.box.right - 4, y - 2);
  }

  curve(paint, curve, range) {
    const seen = this.seen(curve, range), { soft, mean, low } = seen;
    paint.strokeStyle = paint.fillStyle = this.view.color(curve.color);
    paint.lineJoin = "round";
    if (low) {
      paint.globalAlpha = soft ? 0.22 : 0.32;
      for (const [first, last] of runsOf(mean, 0, mean.length)) this.band(paint, seen, first, last);
    }
    paint.globalAlpha = soft ? 0.28 : 1;
    paint.lineWidth = soft ? 1.1 : LINE;
    if (!soft || !low) this.line(paint, seen.places, mean, curve);
    paint.globalAlpha = 1;
    paint.lineWidth = LINE + 0.2;
    if (soft) this.line(paint, seen.places, soft, curve);
  }

  /**
   * The points of a curve in sight: {places: on the canvas, mean, low, high, soft}; low and high are null where a point is one
   * value, soft is null without smoothing. Points that share a column of dots are joined: drawing them apart takes long.
   */
  seen(curve, range) {
    const x = curve.x[this.view.axis], [start, end] = this.part(curve, range), soft = curve.smooth && this.view.half > 0 ? this.smoothed(curve) : null;
    const pick = (values) => values && values.slice(start, end), places = x.slice(start, end).map(this.place);
    if (end - start < 2 * (this.box.right - this.box.left)) return { places, mean: pick(curve.mean), low: pick(curve.low), high: pick(curve.high), soft: pick(soft) };
    const found = { places: [], mean: [], low: [], high: [], soft: soft && [] };
    let column = null, count = 0;
    for (let index = start; index < end; index++) {
      const own = Math.floor(places[index - start]), value = curve.mean[index], last = found.places.length - (own === column);
      if (own !== column) {
        [column, count] = [own, 0];
        found.places.push(own + 0.5);
        for (const name of ["mean", "low", "high", ...(soft ? ["soft"] : [])]) found[name].push(null);
      }
      if (value === null) continue;
      const low = curve.low ? curve.low[index] : value, high = curve.high ? curve.high[index] : value;
      found.mean[last] = ((found.mean[last] ?? 0) * count + value) / (count + 1);
      found.low[last] = count ? Math.min(found.low[last], low) : low;
      found.high[last] = count ? Math.max(found.high[last], high) : high;
      if (soft) found.soft[last] = soft[index];
      count++;
    }
    return found;
  }

  /** A curve's exponential mean; kept until the slider moves. */
  smoothed(curve) {
    if (curve.half !== this.view.half) Object.assign(curve, { half: this.view.half, soft: smooth(curve.x.step, curve.mean, this.view.half) });
    return curve.soft;
  }

  band(paint, { places, low, high }, first, last) {
    paint.beginPath();
    for (let index = first; index < last; index++) paint.lineTo(places[index], this.at(high[index]));
    for (let index = last - 1; index >= first; index--) paint.lineTo(places[index], this.at(low[index]));
    paint.fill();
    paint.lineWidth = 0.7;
    paint.stroke();
  }

  line(paint, places, values, curve) {
    for (const [first, last] of runsOf(values, 0, values.length)) {
      paint.setLineDash(DASHES[curve.dash % DASHES.length]);
      paint.beginPath();
      for (let index = first; index < last; index++) paint.lineTo(places[index], this.at(values[index]));
      paint.stroke();
      paint.setLineDash([]);
      if (last - first === 1 || (curve.dots && values.length < 120)) {
        for (let index = first; index < last; index++) dot(paint, places[index], this.at(values[index]), curve.dots ? 3 : 2);
      }
    }
  }

  /** The height of a value; below everything where a logarithmic scale has no place for it. */
  at(value) {
    return this.log && value <= 0 ? 1e5 : this.level(value);
  }

  /** A triangle above a step whose loss stands out or was not finite. */
  mark(paint, { run, at, color }) {
    const x = this.place(at[this.view.axis]);
    if (this.view.hidden.has(run) || !(x >= this.box.left && x <= this.box.right)) return;
    paint.fillStyle = color === null ? this.view.paint("--mark") : this.view.color(color);
    paint.beginPath();
    paint.moveTo(x - 4.5, this.box.top - 7);
    paint.lineTo(x + 4.5, this.box.top - 7);
    paint.lineTo(x, this.box.top + 1);
    paint.fill();
  }

  describe() {
    const { panel, view } = this, said = [];
    for (const curve of this.shown().slice(0, 8)) {
      const given = curve.mean.filter((value) => value !== null);
      const name = view.runs > 1 ? `${view.name(curve.run)} ${curve.label}` : curve.label;
      if (given.length) said.push(`${name} from ${valueText(given[0], panel.kind)} to ${valueText(given.at(-1), panel.kind)}`);
    }
    this.above.setAttribute("aria-label", `${panel.title}${panel.unit ? `, ${panel.unit}` : ""}: ${said.join("; ")}; ${view.text(view.extent[0])} to ${view.text(view.extent[1])}`);
  }

  /** Draw the crosshair, the chosen part, and, where the mouse or the focus is, the values. */
  point() {
    if (!this.box) return;
    const { box, view } = this, paint = this.cleared(this.above, this.plot.clientWidth, this.plot.clientHeight);
    if (this.drag && Math.abs(this.drag.to - this.drag.from) > 4) {
      paint.fillStyle = view.paint("--select");
      paint.fillRect(this.drag.from, box.top, this.drag.to - this.drag.from, box.bottom - box.top);
    }
    const x = view.cursor === null ? NaN : this.place(view.cursor);
    this.tip.hidden = !(x >= box.left - 1 && x <= box.right + 1) || view.active !== this;
    if (!(x >= box.left - 1 && x <= box.right + 1)) return;
    paint.strokeStyle = view.paint("--quiet");
    paint.setLineDash([3, 3]);
    line(paint, Math.round(x) + 0.5, box.top, Math.round(x) + 0.5, box.bottom);
    paint.setLineDash([]);
    const read = this.read();
    for (const { curve, index, value } of read) {
      const y = this.at(value);
      if (y < box.top - 1 || y > box.bottom + 1) continue;
      paint.fillStyle = view.paint("--card");
      dot(paint, this.place(curve.x[view.axis][index]), y, 4.5);
      paint.fillStyle = view.color(curve.color);
      dot(paint, this.place(curve.x[view.axis][index]), y, 3);
    }
    if (view.active === this) this.tell(read, x);
  }

  /** The values at the crosshair: [{curve, index, value, far}]. far: an evaluation at another step. */
  read() {
    const { view } = this, reach = (this.range[1] - this.range[0]) / 50, found = [];
    for (const curve of this.shown()) {
      const x = curve.x[view.axis], index = nearest(x, view.cursor), value = (curve.smooth && view.half > 0 ? this.smoothed(curve) : curve.mean)[index];
      const far = Math.abs(x[index] - view.cursor) > reach;
      if (value !== null && (!far || curve.dots)) found.push({ curve, index, value, far });
    }
    return found;
  }

  /** The place of the crosshair in words: steps, and what else is known of them. */
  where(read) {
    const { view } = this, nearby = read.find(({ curve, far }) => !far && !curve.dots) ?? read.find(({ far }) => !far);
    if (!nearby) return view.text(view.cursor);
    const { curve, index } = nearby, step = curve.x.step[index], first = index ? curve.x.step[index - 1] + 1 : 1;
    const others = ["tokens", "seconds"].filter((axis) => curve.x[axis]).map((axis) => view.text(curve.x[axis][index], axis));
    const steps = curve.group > 1 && first < step ? `steps ${wholeText(first)} to ${wholeText(step)}` : `step ${wholeText(step)}`;
    return [steps, ...others].join(", ");
  }

  tell(read, x) {
    const { view, panel, box } = this;
    const rows = read.map(({ curve, index, value, far }) => {
      const remarks = [];
      if (curve.low && curve.high[index] > curve.low[index]) remarks.push(`${valueText(curve.low[index], panel.kind)} to ${valueText(curve.high[index], panel.kind)}`);
      if (far) remarks.push(`at step ${wholeText(curve.x.step[index])}`);
      if (curve.smooth && view.half > 0 && !curve.low && curve.mean[index] !== null) remarks.push(`raw ${valueText(curve.mean[index], panel.kind)}`);
      const name = view.runs > 1 ? `${view.name(curve.run)}${this.panel.single ? "" : `, ${curve.label}`}` : curve.label;
      return make("div", { className: "row" }, swatch(view, curve), make("span", { textContent: name }), make("span", { className: "value" }, valueText(value, panel.kind), " ", make("i", { textContent: remarks.length ? `(${remarks.join("; ")})` : "" })));
    });
    for (const mark of panel.marks ?? []) {
      if (!view.hidden.has(mark.run) && Math.abs(this.place(mark.at[view.axis]) - x) < 5) rows.push(make("div", { className: "row", textContent: `▼ ${view.runs > 1 ? `${view.name(mark.run)}: ` : ""}${mark.label}` }));
    }
    this.tip.replaceChildren(make("b", { textContent: this.where(read) }), ...rows);
    const beside = x > (box.left + box.right) / 2 ? x - this.tip.offsetWidth - 12 : x + 12;
    this.tip.style.left = `${Math.max(0, Math.min(beside, this.plot.clientWidth - this.tip.offsetWidth))}px`;
  }

  listen() {
    const { above, view } = this, at = (event) => event.clientX - above.getBoundingClientRect().left;
    const held = (x) => Math.min(this.box.right, Math.max(this.box.left, x));
    const value = (x) => this.range[0] + ((held(x) - this.box.left) / (this.box.right - this.box.left)) * (this.range[1] - this.range[0]);
    const move = (event) => {
      if (this.drag) this.drag.to = held(at(event));
      view.point(this, value(at(event)));
    };
    above.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.drag = { from: held(at(event)), to: held(at(event)) };
      above.setPointerCapture(event.pointerId);
      move(event);
    });
    above.addEventListener("pointermove", move);
    above.addEventListener("pointerup", () => {
      const { drag } = this;
      this.drag = null;
      if (drag && Math.abs(drag.to - drag.from) > 4) view.zoom(value(Math.min(drag.from, drag.to)), value(Math.max(drag.from, drag.to)));
      else this.point();
    });
    for (const kind of ["pointercancel", "pointerleave"]) {
      above.addEventListener(kind, (event) => {
        this.drag = null;
        if (kind === "pointercancel" || event.pointerType === "mouse") view.point(this, null);
      });
    }
    above.addEventListener("dblclick", () => view.zoom());
    above.addEventListener("blur", () => view.active === this && view.point(this, null));
    above.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const { view } = this, shown = this.shown();
    if (!this.box || !shown.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const x = shown.reduce((most, curve) => (curve.x.step.length > most.x.step.length ? curve : most)).x[view.axis];
    const here = view.cursor === null ? null : nearest(x, view.cursor), far = event.shiftKey ? 10 : 1, last = x.length - 1;
    const start = nearest(x, this.range[0]), end = nearest(x, this.range[1]);
    const target = { ArrowLeft: (here ?? end + far) - far, ArrowRight: (here ?? start - far) + far, Home: 0, End: last }[event.key];
    const middle = view.cursor ?? (this.range[0] + this.range[1]) / 2;
    if (target !== undefined) {
      const chosen = x[Math.min(last, Math.max(0, target))], [from, to] = this.range;
      if (view.range && (chosen < from || chosen > to)) view.zoom(chosen - (to - from) / 2, chosen + (to - from) / 2);
      view.point(this, chosen);
      const read = this.read();
      view.say([this.where(read), ...read.map(({ curve, value }) => `${view.runs > 1 ? `${view.name(curve.run)} ` : ""}${curve.label} ${valueText(value, this.panel.kind)}`)].join("; "));
    } else if (event.key === "+" || event.key === "=") {
      view.zoom(middle - (this.range[1] - this.range[0]) / 4, middle + (this.range[1] - this.range[0]) / 4);
    } else if (event.key === "-" || event.key === "_") {
      view.zoom(middle - (this.range[1] - this.range[0]), middle + (this.range[1] - this.range[0]));
    } else if (event.key === "Escape" || event.key === "0") {
      view.point(this, null);
      view.zoom();
    } else return;
    event.preventDefault();
  }
}

function line(paint, x, y, toX, toY) {
  paint.beginPath();
  paint.moveTo(x, y);
  paint.lineTo(toX, toY);
  paint.stroke();
}

function dot(paint, x, y, radius) {
  paint.beginPath();
  paint.arc(x, y, radius, 0, 2 * Math.PI);
  paint.fill();
}

/** The stretches of values without a gap between start and end: [[first, last + 1], ...]. */
function runsOf(values, start, end) {
  const found = [];
  for (let index = start; index < end; index++) {
    if (values[index] === null) continue;
    const first = index;
    while (index < end && values[index] !== null) index++;
    found.push([first, index]);
  }
  return found;
}

/** A short piece of a curve's line, for legends. */
function swatch(view, { color, dash, dots }) {
  const ns = "http://www.w3.org/2000/svg", drawing = document.createElementNS(ns, "svg");
  const stroke = color === null ? "currentColor" : `var(--curve-${color % 6})`;
  for (const [key, value] of Object.entries({ class: "swatch", viewBox: "0 0 24 10", "aria-hidden": "true" })) drawing.setAttribute(key, value);
  const shapes = [["line", { x1: 0, x2: 24, y1: 5, y2: 5, "stroke-width": 2.4, "stroke-dasharray": DASHES[dash % DASHES.length].join(" "), stroke }]];
  if (dots) shapes.push(["circle", { cx: 12, cy: 5, r: 3.4, fill: stroke }]);
  for (const [name, given] of shapes) {
    const shape = document.createElementNS(ns, name);
    for (const [key, value] of Object.entries(given)) shape.setAttribute(key, value);
    drawing.append(shape);
  }
  return drawing;
}
