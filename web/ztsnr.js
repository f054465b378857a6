// What the page does for the pack's nodes: hide widgets that do nothing, keep the sentence under a node, and show
// templates in Chinese.  ComfyUI loads every .js of this folder.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TEMPLATE_MARK = "ztsnr_template"; // in "extra" of the pack's own workflow files

let ours = new Set(); // names of the pack's nodes

app.registerExtension({
  name: "comfyui-ztsnr",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!new URL(import.meta.url).pathname.startsWith(`/extensions/${packOf(nodeData)}/`)) return;
    ours.add(nodeData.name);
    after(nodeType.prototype, "onExecuted", (node, [output]) => say(node, output));
    const rules = rulesOf(nodeData);
    if (rules.size === 0) return;
    after(nodeType.prototype, "onConnectionsChange", (node) => hideIdle(node, rules));
    after(nodeType.prototype, "onConfigure", (node) => hideIdle(node, rules)); // values of a file come without a callback
    after(nodeType.prototype, "onNodeCreated", (node) => {
      for (const widget of node.widgets) after(widget, "callback", () => fit(node, () => hideIdle(node, rules)));
      fit(node, () => hideIdle(node, rules));
    });
  },

  async beforeConfigureGraph(workflow) {
    // Only as the file of a template comes: a copy that the user has saved stays as it is
    const isTemplate = workflow.extra?.[TEMPLATE_MARK];
    delete workflow.extra?.[TEMPLATE_MARK];
    const locale = app.extensionManager.setting.get("Comfy.Locale");
    if (isTemplate && locale === "zh") translate(workflow, await texts(locale));
  },

  afterConfigureGraph() {
    restore(); // not awaited: the graph need not wait for what is said about it
  },
});

/** Folder of the pack that a node comes from, "" for the core's. */
function packOf(nodeData) {
  return nodeData.python_module?.match(/^custom_nodes\.(.+)$/)?.[1] ?? "";
}

/** Have a method of an object followed by `then(object, arguments)`. */
function after(object, method, then) {
  const before = object[method];
  object[method] = function (...received) {
    const result = before?.apply(this, received);
    then(this, received);
    return result;
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// Widgets that do nothing for what is chosen

/** Name of an input -> { used_for: {name of a list: [choices]}, unused_with: name of an input }, as the schema says. */
function rulesOf(nodeData) {
  const inputs = Object.entries({ ...nodeData.input?.required, ...nodeData.input?.optional });
  return new Map(inputs.filter(([, spec]) => spec[1]?.used_for).map(([name, spec]) => [name, spec[1]]));
}

function hideIdle(node, rules) {
  for (const widget of node.widgets ?? []) {
    const rule = rules.get(widget.name);
    if (rule) hide(widget, isIdle(node, rule) && !isLinked(node, widget.name));
  }
  node.setDirtyCanvas?.(true, true);
}

function isIdle(node, { used_for, unused_with }) {
  if (unused_with && isLinked(node, unused_with)) return true;
  return Object.entries(used_for).some(([name, choices]) => {
    const list = node.widgets.find((widget) => widget.name === name);
    return list && !isLinked(node, name) && !choices.includes(list.value); // what a link brings is not known here
  });
}

function isLinked(node, name) {
  return node.inputs?.some((input) => input.name === name && input.link != null) ?? false;
}

function hide(widget, hidden) {
  widget.hidden = hidden; // the canvas asks for this
  // Vue asks for the options, and only notices a change through the reactive copy that the widget's state holds
  (widget._state?.options ?? widget.options).hidden = hidden;
}

/** Let a change of a node's widgets change its height by as much. */
function fit(node, change) {
  const before = node.computeSize()[1];
  change();
  const more = node.computeSize()[1] - before;
  if (more !== 0) node.setSize([node.size[0], node.size[1] + more]);
}

// ---------------------------------------------------------------------------------------------------------------------
// The sentence under a node.  While a node runs, the server sends it; a node whose result is cached does not run, and the
// server then sends the node's output alone.

function say(node, output) {
  const text = output?.text;
  if (!text || node.graph !== app.canvas.graph) return; // the event knows nodes by their id in the open graph
  const lines = (Array.isArray(text) ? text : [text]).join("\n");
  const escaped = lines.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  api.dispatchCustomEvent("progress_text", { nodeId: String(node.id), text: escaped });
}

/** Say again what the last runs said of nodes that are as they were then, and so is all that comes before them. */
async function restore() {
  const silent = new Set(app.graph.nodes.filter((node) => ours.has(node.type)));
  if (silent.size === 0) return;
  const history = await (await api.fetchApi("/history?max_items=20")).json();
  const { output: now } = await app.graphToPrompt();
  for (const run of Object.values(history).reverse()) {
    for (const node of silent) {
      const output = run.outputs?.[node.id];
      if (!output?.text || !isSame(String(node.id), now, run.prompt[2])) continue;
      say(node, output);
      silent.delete(node);
    }
  }
}

/** Whether a node and everything before it is the same in two prompts, which is when ComfyUI takes it from the cache. */
function isSame(id, now, then) {
  const [a, b] = [now[id], then[id]];
  if (!a || !b || a.class_type !== b.class_type) return false;
  const names = new Set([...Object.keys(a.inputs), ...Object.keys(b.inputs)]);
  return [...names].every((name) => {
    const [x, y] = [a.inputs[name], b.inputs[name]];
    return JSON.stringify(x) === JSON.stringify(y) && (!Array.isArray(x) || isSame(x[0], now, then));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Templates in other languages.  ComfyUI translates its own templates, and knows no way for those of packs.

/** { titles: {English: translated}, notes: {English title of the note: translated text} } */
async function texts(locale) {
  return (await fetch(new URL(`./templates/${locale}.json`, import.meta.url))).json();
}

/** Put a template's titles and notes into another language, in place. */
function translate(workflow, { titles, notes }) {
  for (const node of workflow.nodes) {
    if (notes[node.title]) node.widgets_values = [notes[node.title]];
    node.title = titles[node.title] ?? node.title;
  }
  for (const group of workflow.groups) group.title = titles[group.title] ?? group.title;
}
