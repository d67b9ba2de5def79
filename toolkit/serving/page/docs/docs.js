// The endpoints of the OpenAPI document, each with its fields and a form that calls it. Paths are relative: a proxy may
// serve the page under a prefix.

const main = document.getElementById("endpoints"), state = document.getElementById("state");
let schemas = {};

function made(name, attributes, ...children) {
  const element = Object.assign(document.createElement(name), attributes);
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const named = (schema) => schema.$ref?.split("/").pop();

// What a value may be, in words; objects of the document by their name.
function kind(schema) {
  if (schema.$ref) return named(schema);
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return [...new Set(several.map(kind))].join(" or ");
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" or ");
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items ?? {})}`;
  const least = schema.minimum ?? schema.exclusiveMinimum, most = schema.maximum ?? schema.exclusiveMaximum;
  const bounds = [
    least === undefined ? "" : `${"minimum" in schema ? ">=" : ">"} ${least}`,
    most === undefined ? "" : `${"maximum" in schema ? "<=" : "<"} ${most}`,
  ].filter(Boolean);
  return [schema.type ?? "anything", bounds.join(", ")].filter(Boolean).join(" ");
}

// The names of the objects that a schema is made of, without those that they are made of.
function objects(schema) {
  if (schema.$ref) return [named(schema)];
  return [...(schema.anyOf ?? schema.oneOf ?? []), ...(schema.items ? [schema.items] : [])].flatMap(objects);
}

function fields(schema, above = []) {
  const properties = Object.entries(schema.properties ?? {});
  if (!properties.length) return kind(schema);
  const table = made("table", {}, made("tr", {}, ...["field", "value", "default", ""].map((textContent) =>
    made("th", { textContent }))));
  for (const [name, one] of properties) {
    const required = schema.required?.includes(name);
    const inner = objects(one).filter((found) => schemas[found]?.properties && !above.includes(found));
    const value = made("td", { textContent: kind(one) });
    for (const found of new Set(inner)) value.append(later(found, () => fields(schemas[found], [...above, found])));
    table.append(made("tr", {}, made("td", { textContent: name }), value,
      made("td", { textContent: required ? "required" : "default" in one ? JSON.stringify(one.default) : "" }),
      made("td", { textContent: one.description ?? "" })));
  }
  return table;
}

// An entry whose content is made when it is first opened.
function later(title, content, className = "") {
  const entry = made("details", { className }, made("summary", {}, title));
  entry.addEventListener("toggle", () => {
    if (entry.open && entry.children.length === 1) entry.append(made("div", {}, content()));
  });
  return entry;
}

// A value that the schema takes: of an object the required fields.
function sample(schema) {
  if (schema.$ref) return sample(schemas[named(schema)]);
  if (schema.examples) return schema.examples[0];
  if (schema.anyOf ?? schema.oneOf) return sample((schema.anyOf ?? schema.oneOf)[0]);
  if (schema.enum) return schema.enum[0];
  if ("const" in schema) return schema.const;
  if (schema.type === "array") return [sample(schema.items ?? {})];
  if (schema.type === "integer" || schema.type === "number") return schema.minimum ?? 0;
  if (schema.type === "boolean") return false;
  if (schema.type !== "object" && !schema.properties) return "Hello";
  const names = (schema.required ?? []).filter((name) => schema.properties?.[name]);
  return Object.fromEntries(names.map((name) => [name, sample(schema.properties[name])]));
}

function caller(path, method, operation, body) {
  const parameters = operation.parameters ?? [];
  const inputs = parameters.map((one) => made("input", { type: "text", required: one.in === "path", name: one.name }));
  const text = body && made("textarea", { rows: 8, spellcheck: false, ariaLabel: "body" });
  if (text) text.value = JSON.stringify(sample(body), null, 2);
  const button = made("button", { textContent: "Send" }), answer = made("output", {});
  const form = made("form", {}, ...parameters.map((one, at) => made("label", {}, `${one.name} `, inputs[at])),
    text ?? "", made("div", {}, button), answer);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    let url = path.slice(1);
    const query = new URLSearchParams();
    parameters.forEach((one, at) => {
      const { value } = inputs[at];
      if (one.in === "path") url = url.replace(new RegExp(`\\{${one.name}(:path)?\\}`), encodeURIComponent(value));
      else if (value !== "") query.append(one.name, value);
    });
    const key = document.getElementById("key").value;
    const headers = { ...(text ? { "content-type": "application/json" } : {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const shown = made("pre", {});
    button.disabled = true;
    try {
      const response = await fetch(url + (query.size ? `?${query}` : ""), { method: method.toUpperCase(), headers, body: text?.value });
      answer.replaceChildren(made("p", { className: response.ok ? "" : "error", textContent: `${response.status} ${response.statusText}` }), shown);
      const reader = response.body?.pipeThrough(new TextDecoderStream()).getReader();
      for (let part = await reader?.read(); part && !part.done; part = await reader.read()) shown.textContent += part.value;
      if (response.headers.get("content-type")?.startsWith("application/json")) {
        shown.textContent = JSON.stringify(JSON.parse(shown.textContent), null, 2);
      }
    } catch (error) {
      answer.replaceChildren(made("p", { className: "error", textContent: String(error) }));
    } finally {
      button.disabled = false;
    }
  });
  return form;
}

function endpoint(path, method, operation) {
  const body = operation.requestBody?.content?.["application/json"]?.schema;
  const form = operation.requestBody?.content?.["multipart/form-data"]?.schema;
  const query = (operation.parameters ?? []).filter((one) => one.in === "query");
  const asked = { properties: Object.fromEntries(query.map((one) => [one.name, { ...one.schema, description: one.description }])) };
  const answers = Object.entries(operation.responses ?? {}).flatMap(([status, { content = {} }]) =>
    Object.entries(content).map(([type, { schema }]) => [status, type, schema]));
  const title = made("span", {}, made("b", { textContent: method.toUpperCase() }), path);
  return later(title, () => made("div", {},
    made("p", { textContent: operation.description ?? "" }),
    query.length ? fields(asked) : "",
    body ?? form ? fields(schemas[named(body ?? form)] ?? body ?? form) : "",
    ...answers.map(([status, type, schema]) => later(`${status}: ${schema ? kind(schema) : type}`,
      () => schema ? fields(schemas[named(schema)] ?? schema) : type)),
    form ? "" : caller(path, method, operation, body)), "endpoint");
}

async function start() {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`The server answered ${response.status}.`);
  const about = await response.json();
  schemas = about.components?.schemas ?? {};
  document.title = `${about.info.title} ${about.info.version}: HTTP API`;
  const found = [];
  for (const [path, methods] of Object.entries(about.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const entry = endpoint(path, method, operation);
      found.push([entry, (path + JSON.stringify(operation) + bodyFields(operation)).toLowerCase()]);
    }
  }
  main.replaceChildren(...found.map(([entry]) => entry));
  const find = document.getElementById("find");
  find.addEventListener("input", () => {
    for (const [entry, text] of found) entry.hidden = !text.includes(find.value.toLowerCase());
  });
}

function bodyFields(operation) {
  const body = operation.requestBody?.content?.["application/json"]?.schema;
  return body ? Object.keys(schemas[named(body)]?.properties ?? {}).join(" ") : "";
}

start().catch((error) => Object.assign(state, { textContent: error.message, className: "error" }));
