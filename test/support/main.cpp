// The one main of tests without MPI.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
