# ---- Facts of the site: export them before the start. None of them is guessed; all that are missing are named at once.
missing=()
fact() {
  if [[ -z "${!1:-}" ]]; then
    missing+=("$1 is $2")
  fi
}
complete() {
  if ((${#missing[@]} > 0)); then
    echo "$0: export what is missing, then start it again:" >&2
    printf '  %s\n' "${missing[@]}" >&2
    exit 2
  fi
}
