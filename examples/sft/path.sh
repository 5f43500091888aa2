# To be sourced from this folder: lets Python find the project's modules.
PYTHONPATH="$(cd ../.. && pwd)${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
