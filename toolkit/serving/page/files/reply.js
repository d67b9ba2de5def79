// A reply, token by token: probabilities, alternatives, and branches.
import { detokenize, stream } from "./api.js";

export const ALTERNATIVES = 5;
const id = (name) => Number(name.slice("token_id:".length));
const shown = (text) => text.replaceAll("\n", "↵\n");

export class Reply {
  // promptIds: of the request. kept: tokens that a branch begins with. settings: fields of the request.
  constructor(model, promptIds, settings, kept, onBranch) {
    Object.assign(this, { model, promptIds, settings, kept, onBranch });
    this.tokens = kept.map((token) => ({ ...token, kept: true }));
    this.text = "";
    this.finish = null;
    this.version = "";
    this.element = document.createElement("article");
    this.element.className = "reply";
    const title = document.createElement("h2");
    this.shownVersion = document.createElement("span");
    this.shownVersion.className = "version";
    const again = document.createElement("button");
    Object.assign(again, { textContent: "Again", title: "the same request, beside this reply: by the weights of now" });
    again.addEventListener("click", () => this.onBranch(this, this.kept));
    const name = document.createElement("span");
    Object.assign(name, { className: "model", textContent: model });
    title.append(name, this.shownVersion, again);
    this.body = document.createElement("div");
    this.body.className = "tokens";
    this.footer = document.createElement("footer");
    this.element.append(title, this.body, this.footer);
    this.kept.forEach((_, at) => this.body.append(this.span(at)));
  }

  get message() {
    return { role: "assistant", content: this.whole };
  }

  get whole() {
    return this.kept.map((token) => token.text).join("") + this.text;
  }

  async run(signal) {
    const began = performance.now();
    const body = {
      ...this.settings, model: this.model, prompt: [...this.promptIds, ...this.kept.map((token) => token.id)],
      logprobs: ALTERNATIVES, return_tokens_as_token_ids: true, skip_special_tokens: true,
    };
    const offsets = [];
    for await (const chunk of stream(body, signal)) {
      const choice = chunk.choices[0];
      if (!choice) continue;
      this.version = chunk.system_fingerprint ?? this.version;
      this.shownVersion.textContent = this.version;
      this.text += choice.text;
      (choice.logprobs?.tokens ?? []).forEach((name, at) => {
        const { token_logprobs, top_logprobs, text_offset } = choice.logprobs;
        const others = Object.entries(top_logprobs?.[at] ?? {}).map(([key, value]) => ({ id: id(key), logprob: value }));
        others.sort((one, two) => two.logprob - one.logprob);
        this.tokens.push({ id: id(name), logprob: token_logprobs[at], others, text: "" });
        offsets.push(text_offset[at]);
        this.body.append(this.span(this.tokens.length - 1));
      });
      offsets.forEach((offset, at) => {
        const token = this.tokens[this.kept.length + at];
        const text = this.text.slice(offset, offsets[at + 1] ?? this.text.length);
        if (text !== token.text) {
          token.text = text;
          this.body.children[this.kept.length + at].textContent = shown(text);
        }
      });
      this.finish = choice.finish_reason ?? this.finish;
      const count = this.tokens.length - this.kept.length;
      const seconds = (performance.now() - began) / 1000;
      this.footer.textContent = `${count} tokens, ${(count / seconds).toFixed(1)} /s${this.finish ? `, ${this.finish}` : ""}`;
    }
  }

  span(at) {
    const token = this.tokens[at];
    const element = document.createElement("span");
    const share = token.logprob === undefined ? 1 : Math.exp(token.logprob);
    element.className = `token p${Math.min(4, Math.floor(share * 5))}${token.kept ? " kept" : ""}`;
    element.textContent = shown(token.text);
    element.tabIndex = at === 0 ? 0 : -1;
    element.dataset.at = at;
    element.addEventListener("focus", () => this.show(at, element));
    element.addEventListener("mouseenter", () => this.show(at, element));
    element.addEventListener("mouseleave", hide);
    element.addEventListener("blur", hide);
    element.addEventListener("click", () => this.branch(at, this.tokens[at]));
    element.addEventListener("keydown", (event) => this.key(event, at, element));
    return element;
  }

  key(event, at, element) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key in steps) {
      this.body.children[at + steps[event.key]]?.focus();
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      choose(event.key === "ArrowDown" ? 1 : -1);
    } else if (event.key === "Enter") {
      this.branch(at, chosen() ?? this.tokens[at]);
    } else {
      return;
    }
    event.preventDefault();
  }

  // Another reply that has this one's tokens before ``at``, and then ``token``.
  async branch(at, token) {
    hide();
    const text = token.text || (await detokenize(token.id, this.model));
    this.onBranch(this, [...this.tokens.slice(0, at), { ...token, text }]);
  }

  async show(at, element) {
    const token = this.tokens[at];
    const others = token.others ?? [];
    const texts = await Promise.all(others.map((other) => detokenize(other.id, this.model)));
    if (!element.matches(":hover, :focus")) return;
    const box = document.getElementById("details");
    const table = document.createElement("table");
    others.forEach((other, index) => {
      const row = table.insertRow();
      row.insertCell().textContent = JSON.stringify(texts[index]);
      row.insertCell().textContent = `${(100 * Math.exp(other.logprob)).toFixed(1)} %`;
      row.insertCell().textContent = other.logprob.toFixed(3);
      row.choice = { ...other, text: texts[index], others };
      row.ariaSelected = String(other.id === token.id);
    });
    box.replaceChildren(token.logprob === undefined ? "of the branch" : `log-probability ${token.logprob.toFixed(4)}`, table);
    const place = element.getBoundingClientRect();
    box.style.left = `${Math.min(place.left + scrollX, innerWidth - 280)}px`;
    box.style.top = `${place.bottom + scrollY + 4}px`;
    box.hidden = false;
  }
}

function hide() {
  document.getElementById("details").hidden = true;
}

function rows() {
  return [...document.querySelectorAll("#details tr")];
}

function chosen() {
  return document.getElementById("details").hidden ? null : rows().find((row) => row.ariaSelected === "true")?.choice;
}

function choose(step) {
  const all = rows();
  const at = all.findIndex((row) => row.ariaSelected === "true");
  const next = all[Math.max(0, Math.min(all.length - 1, at + step))];
  all.forEach((row) => { row.ariaSelected = String(row === next); });
}
