#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image. Choose a base image with Python 3.11 or later.
set -e
apt-get update && apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu \
  -r /autograder/source/project/requirements.txt
