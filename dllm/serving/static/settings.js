// The settings that people change: read from their form, remembered in this tab, said in one line.

const PLACE = "dllm.settings";
const LANES = ["a", "b"];

export class Settings {
  models = [];

  constructor(form, changed) {
    this.form = form;
    this.changed = changed;
    try {
      const kept = Object.entries(JSON.parse(sessionStorage.getItem(PLACE)) ?? {});
      for (const [name, value] of kept) this.#put(name, value);
    } catch {
      sessionStorage.removeItem(PLACE);
    }
    form.addEventListener("input", () => this.#keep());
    form.addEventListener("submit", (event) => event.preventDefault());
    this.#follow();
  }

  #put(name, value) {
    const field = this.form.elements[name];
    if (field?.type === "checkbox") field.checked = value;
    else if (field) {
      if (field.tagName === "SELECT" && ![...field.options].some((o) => o.value === value)) field.add(new Option(value, value));
      field.value = value;
    }
  }

  #keep() {
    this.#follow();
    const fields = [...this.form.elements].filter((field) => field.name);
    const values = fields.map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]);
    sessionStorage.setItem(PLACE, JSON.stringify(Object.fromEntries(values)));
    this.changed();
  }

  /** Shows what belongs to the rule that is chosen, and the second lane if it is wanted. */
  #follow() {
    const second = document.getElementById("lane-b");
    second.hidden = second.disabled = !this.two;
    const defaults = this.served?.defaults ?? {};
    for (const field of this.form.querySelectorAll("#lane-a [data-setting]")) {
      const { setting } = field.dataset;
      const text = setting in defaults ? String(defaults[setting] ?? "none") : null;
      if (text !== null && field.tagName === "SELECT") field.options[0].text = text;
      else if (text !== null) field.placeholder = text;
    }
    for (const lane of LANES) {
      const first = this.value("a", "reveal_rule") || this.form.elements["a.reveal_rule"].options[0].text;
      const rule = this.value(lane, "reveal_rule") || first;
      for (const row of this.form.querySelectorAll(`#lane-${lane} [data-rule]`)) {
        row.hidden = row.dataset.rule !== rule;
        row.querySelector("input").disabled = row.hidden; // what is hidden is not checked
      }
    }
  }

  /** Puts the server's models into the lists; a choice that was made stays. */
  offer(models) {
    this.models = models;
    const names = models.map((model) => model.id);
    for (const lane of LANES) {
      const list = this.form.elements[`${lane}.model`];
      const chosen = list.value;
      const options = names.map((name) => new Option(name, name));
      list.replaceChildren(...(lane === "b" ? [new Option("the same", ""), ...options] : options));
      if ([...list.options].some((option) => option.value === chosen)) list.value = chosen;
    }
    this.#follow();
    this.changed();
  }

  /** What the server says of the model of the first lane. */
  get served() {
    return this.models.find((model) => model.id === this.value("a", "model"));
  }

  get two() {
    return this.form.elements.two.checked;
  }

  get system() {
    return this.form.elements.system.value.trim();
  }

  value(lane, name) {
    return this.form.elements[`${lane}.${name}`].value;
  }

  /** The tokens that end an answer of a model. */
  endsOf(id) {
    return this.models.find((model) => model.id === id)?.ends ?? [];
  }

  /** What is asked for in each lane: [{name, model, settings, ends}]; of the second, what is left empty is as in the first. */
  lanes() {
    const first = { model: this.value("a", "model"), settings: this.#settings("a") };
    if (!this.two) return [{ ...first, name: first.model || "model", ends: this.endsOf(first.model) }];
    const own = this.#settings("b");
    const second = { model: this.value("b", "model") || first.model, settings: { ...first.settings, ...own } };
    const differs = Object.keys(own).filter((name) => own[name] !== first.settings[name]);
    const defaults = this.served?.defaults ?? {};
    const value = (lane, key) => lane.settings[key] ?? (key in defaults ? (defaults[key] ?? "none") : "as served");
    const name = (lane) => [lane.model, ...differs.map((key) => `${said(key)} ${value(lane, key)}`)].join(" · ");
    return [first, second].map((lane, number) => {
      return { ...lane, name: `${"AB"[number]} · ${name(lane)}`, ends: this.endsOf(lane.model) };
    });
  }

  #settings(lane) {
    const found = {};
    for (const field of this.form.querySelectorAll(`#lane-${lane} [data-setting]`)) {
      if (field.value === "" || field.disabled) continue;
      found[field.dataset.setting] = field.type === "number" ? Number(field.value) : field.value;
    }
    return found;
  }

  /** The settings in one line. */
  summary() {
    return this.lanes()
      .map(({ name, settings }) => {
        const set = Object.entries(settings).map(([key, value]) => `${said(key)} ${value}`);
        return this.two ? name : [name, ...(set.length ? set : ["settings as served"])].join(" · ");
      })
      .join("  |  ");
  }
}

const said = (key) => key.replaceAll("_", " ");
