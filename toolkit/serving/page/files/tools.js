// A reply of a chat with tools: reasoning, text and calls, and fields for what the calls return.
import { chatStream } from "./api.js";

export class ToolReply {
  // messages, tools, settings: of the request. onAnswer: takes the reply and the messages of its calls' results.
  constructor(model, messages, tools, settings, onAnswer) {
    Object.assign(this, { model, messages, tools, settings, onAnswer });
    this.content = "";
    this.calls = [];
    this.element = document.createElement("article");
    this.element.className = "reply";
    const title = document.createElement("h2");
    const name = document.createElement("span");
    Object.assign(name, { className: "model", textContent: model });
    title.append(name);
    this.reasoning = this.part("reasoning");
    this.body = this.part("tokens");
    this.list = document.createElement("form");
    this.list.addEventListener("submit", (event) => { event.preventDefault(); this.answer(); });
    this.footer = document.createElement("footer");
    this.element.append(title, this.reasoning, this.body, this.list, this.footer);
  }

  part(className) {
    const made = document.createElement("div");
    made.className = className;
    return made;
  }

  get message() {
    const calls = this.calls.map(({ id, name, text }) => ({ id, type: "function", function: { name, arguments: text } }));
    return { role: "assistant", content: this.content || null, ...(calls.length ? { tool_calls: calls } : {}) };
  }

  async run(signal) {
    const body = { ...this.settings, model: this.model, messages: this.messages, tools: this.tools };
    for await (const chunk of chatStream(body, signal)) {
      const choice = chunk.choices[0];
      if (!choice) continue;
      const { content, reasoning_content, tool_calls } = choice.delta;
      this.content += content ?? "";
      this.body.textContent = this.content;
      this.reasoning.textContent += reasoning_content ?? "";
      for (const call of tool_calls ?? []) this.call(call);
      this.footer.textContent = [chunk.system_fingerprint, choice.finish_reason].filter(Boolean).join(", ");
    }
    if (!this.calls.length) return;
    const button = document.createElement("button");
    button.textContent = "Answer";
    this.list.append(button);
  }

  call({ index, id, function: { name, arguments: text } }) {
    if (!this.calls[index]) {
      const label = document.createElement("label");
      const shown = document.createElement("code");
      const result = document.createElement("input");
      Object.assign(result, { type: "text", placeholder: "what it returns", className: "result" });
      label.className = "call";
      label.append(shown, result);
      this.list.append(label);
      this.calls[index] = { id, name, text: "", shown, result };
    }
    const call = this.calls[index];
    call.text += text ?? "";
    call.shown.textContent = `${call.name}(${call.text})`;
  }

  answer() {
    this.onAnswer(this, this.calls.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result.value })));
  }
}
