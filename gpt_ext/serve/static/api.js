// What the page asks the server: JSON, and the server-sent events of a completion.

export class NeedsToken extends Error {}

export function keepToken(token) {
  sessionStorage.setItem("token", token);
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `the server answered ${response.status}`;
  throw response.status === 401 ? new NeedsToken(message) : new Error(message);
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export async function get(path) {
  return (await ask(path)).json();
}

export async function look(text, position, signal) {
  return (await post("/api/look", { text, position }, signal)).json();
}

/** The pieces of a completion, as they come. */
export async function* complete(request, signal) {
  const response = await post("/v1/completions", { ...request, stream: true }, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const { choices, error } = JSON.parse(data);
    if (error) throw new Error(error.message);
    if (choices[0]?.text) yield choices[0].text;
  }
  throw new Error("the server broke off");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}
