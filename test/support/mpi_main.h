// For tests that run under mpirun: every rank runs the same test cases in the same order.
#pragma once

#include "parallel/parallel.h"

distill::MpiSession& test_session();
