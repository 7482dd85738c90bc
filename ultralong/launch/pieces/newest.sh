
newest() {
  # find would take a name with a leading dash for an option.
  local folder="$run_folder/checkpoints"
  if [[ "$folder" != /* ]]; then
    folder="./$folder"
  fi
  find "$folder" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1 || true
}
