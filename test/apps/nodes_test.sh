#!/bin/sh
# Runs a test program within pretend nodes. 77, which CTest calls skipped, where they are not possible, and the reason.
tools=$(dirname "$0")/../../tools
"$tools/pretend_nodes.sh" check
case $? in
  0) ;;
  2) exit 77 ;;
  *) exit 1 ;;
esac
exec "$tools/pretend_nodes.sh" with "$@"
