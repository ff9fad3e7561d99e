// Requests to the page's server. A session's token goes with whatever changes something.

let csrf = "";

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function get(path) {
  return answer(await fetch(path, { headers: { Accept: "application/json" } }));
}

export async function post(path, body) {
  const headers = { "Content-Type": "application/json", "X-Isthmus-CSRF": csrf };
  return answer(await fetch(path, { method: "POST", headers, body: JSON.stringify(body) }));
}

export function useSession(session) {
  csrf = session ? session.csrf : "";
}

async function answer(response) {
  let found = {};
  try {
    found = await response.json();
  } catch {
    found = { error: response.statusText };
  }
  if (!response.ok) throw new Refused(response.status, found.error || response.statusText);
  return found;
}
