// Floating-point operations of a model, for MFU and for the choice of what travels from teacher to student.
#pragma once

#include "core/model/params.h"

namespace distill {

// 2 a parameter and token forward, 4 backward; the embedding look-up is none.
inline double flops_per_token(const ModelSpec& spec, bool trains) {
  const double embedding = spec.tied_head ? 0 : double(spec.vocabulary) * double(spec.hidden);
  return (trains ? 6 : 2) * (double(param_table(spec).count()) - embedding);
}

// Causal attention: 4 per (query, key) pair and column forward, 8 backward.
inline double flops_per_pair(const ModelSpec& spec, bool trains) {
  return (trains ? 12 : 4) * double(spec.layers) * double(spec.q_cols());
}

}  // namespace distill
