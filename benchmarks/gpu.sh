#!/usr/bin/env bash
# Tests, benchmarks and a short training on a GPU, in stages that leave their results on disk and never stop the next.
#
#   bash benchmarks/gpu.sh                8 minutes at most, on a CUDA device
#   bash benchmarks/gpu.sh --dry          all stages on the CPU at tiny sizes
#   bash benchmarks/gpu.sh --no-install   leaves missing packages missing
#
# Results are files in $OUT, by default benchmarks/results/gpu, in a dry run a temporary folder. Missing packages are
# installed by pip where it can; torch, torchvision, triton and numpy stay as they are. More variables:
#   PYTHON     the interpreter, python3
#   WHEELS     a folder of wheels to install from, in place of the package index
#   MATERIAL   a folder with weights/ and data/, as tests/material.py has it; by default "shared" beside or in the checkout
#   COMMIT     written down where the checkout has no git
#   STAGES     those to run, by default "environment tests upsamplers end_to_end training training_any"
# Exit status: 0 if every stage did its work, 1 if one failed or was skipped, 2 if there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

dry= install=
for argument; do
    case $argument in
        --dry) dry=--dry install=--no-install ;;
        --no-install) install=--no-install ;;
        *) echo "unknown option $argument; there are --dry and --no-install" >&2; exit 1 ;;
    esac
done
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ -n "$dry" ]; then
    OUT=${OUT:-$(mktemp -d)}
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: nothing was run; --dry tries the stages on the CPU"
    exit 2
fi
OUT=${OUT:-benchmarks/results/gpu}
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
log=$OUT/log.txt
: > "$log"
echo "stage,seconds,status" > "$OUT/stages.csv"

deadline=$((SECONDS + 480))
[ -z "$dry" ] || deadline=$((SECONDS + 900)) # the interpreter of Triton on a busy machine
worst=0

# stage NAME SECONDS COMMAND...: run it within its limit and the deadline; 77 means skipped.
stage() {
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) code status
    shift 2
    [[ " ${STAGES:-$name} " == *" $name "* ]] || return
    [ -z "$dry" ] || limit=$((limit * 3))
    if [ "$left" -lt 15 ]; then
        echo "$name: skipped, $left s are left"
        echo "$name,0,skipped" >> "$OUT/stages.csv"
        worst=1
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    echo "$name: begins, at most $limit s"
    echo "== $name: $*" >> "$log"
    local first=$(($(wc -l < "$log") + 1))
    timeout --signal="${signal:-TERM}" --kill-after=10 "$limit" "$@" >> "$log" 2>&1
    code=$?
    case $code in
        0) status=ok ;;
        77) status=skipped ;;
        124 | 137) status="time is up" ;;
        *) status="failed ($code)" ;;
    esac
    if [ "$code" != 0 ]; then
        worst=1
        tail -n "+$first" "$log" | tail -n 12 | cut -c1-240 | sed 's/^/    /'
    fi
    echo "$name: $status after $((SECONDS - start)) s"
    echo "$name,$((SECONDS - start)),$status" >> "$OUT/stages.csv"
}

# Tests of kernels, engines and streams first; all others behind them, in case one wants a GPU.
first=(tests/ops) others=() parallel=()
for path in tests/inference tests/*engine*.py tests/*streaming*.py; do
    [ ! -e "$path" ] || first+=("$path")
done
for path in tests/*/ tests/test_*.py; do
    path=${path%/}
    [[ " ${first[*]} " == *" $path "* || $path == */__pycache__ ]] || others+=("$path")
done
# Most of their time goes into compiling kernels, one after the other in each process.
if [ -z "$dry" ] && "$python" -c 'import xdist' 2> /dev/null; then
    parallel=(-n 12)
fi
# Without a GPU no test may be left, which pytest calls 5.
none=$([ -n "$dry" ] && echo 0 || echo 5)

# Budgets: 25 + 105 + 120 + 45 + 110 + 60 = 465 s.
stage environment 25 "$python" benchmarks/gpu_environment.py "$OUT" $install
signal=INT stage tests 105 bash -c '"$@"; code=$?; [ $code != 5 ] || code='"$none"'; exit $code' - \
    "$python" -m pytest -m gpu -v -rfE --tb=short --continue-on-collection-errors -p no:cacheprovider \
    --junitxml="$OUT/tests.xml" "${parallel[@]}" "${first[@]}" "${others[@]}"
if [ -n "$dry" ]; then
    export TRITON_INTERPRET=1
fi
stage upsamplers 120 "$python" benchmarks/gpu.py upsamplers "$OUT" $dry
stage end_to_end 45 "$python" benchmarks/gpu.py end_to_end "$OUT" $dry
stage training_any 60 "$python" benchmarks/gpu_training.py "$OUT" $dry --any --seconds 45
unset TRITON_INTERPRET
stage training 110 "$python" benchmarks/gpu_training.py "$OUT" $dry --seconds 90

"$python" benchmarks/gpu.py summary "$OUT" || worst=1
echo "results are in $OUT"
exit $worst
