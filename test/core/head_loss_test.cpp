// The output head fused with the loss: the chunk changes nothing but memory.
#include "core/distill/head_loss.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "core/model/vocabulary.h"
#include "kernels/backends.h"
#include "parallel/parallel.h"
#include "test/support/tiny_models.h"

using namespace distill;
using namespace distill::test;

namespace {

// Random teacher logits of the same positions, whatever the chunks.
class FixedTeacher : public TeacherSource {
 public:
  FixedTeacher(Device& device, std::int64_t positions, std::int64_t columns, DType dtype)
      : logits_(device.tensor(positions, columns, dtype)) {
    device.fill_normal(logits_.view(), 3, 0, 0, 2.0f);
  }
  // Only these columns of them.
  void cut(std::int64_t first, std::int64_t columns) { first_ = first, columns_ = columns; }
  void begin(const MicroBatch&) override { next_ = 0; }
  ConstView acquire(std::int64_t positions) override {
    next_ += positions;
    const ConstView logits = logits_.view().row_slice(next_ - positions, positions);
    return columns_ < 0 ? logits : logits.col_slice(first_, columns_);
  }
  void release() override {}
  double seconds_waited() const override { return 0; }

 private:
  Tensor logits_;
  std::int64_t next_ = 0, first_ = 0, columns_ = -1;
};

struct Result {
  LossSums sums;
  std::vector<double> dhidden, dhead;
};

// With a group, as a rank of it: its rows of the head are moved to where a model that is cut has them.
Result run(std::int64_t chunk, Communicator* group = nullptr) {
  const std::int64_t positions = 23;
  const auto device = make_cpu_device(1);
  const ModelSpec spec = tiny_spec("qwen2", false);
  Transformer model(*device, spec, DType::f64, {.tokens = 1, .supervised = 1, .longest = 1, .trains = true});
  randomise(*device, model, 1);
  LossSpec loss;
  loss.vocabulary = 37;
  HeadLoss head(*device, model, loss, chunk, positions, group);
  Tensor hidden = device->tensor(positions, spec.hidden, DType::f64), labels = device->tensor(1, positions, DType::i32);
  device->fill_normal(hidden.view(), 2, 0, 0, 1.0f);
  std::vector<std::int32_t> ids;
  for (int i = 0; i < positions; ++i) ids.push_back(i * 5 % 37);
  device->upload(labels.view(), ids.data());
  FixedTeacher teacher(*device, positions, 37, DType::f64);
  teacher.begin({});
  std::int64_t columns = 37;
  if (group) {
    const VocabularyPart part = vocabulary_part(37, spec.vocabulary, group->size(), group->rank());
    columns = std::min<std::int64_t>(std::max<std::int64_t>(37 - part.first, 0), part.columns);
    teacher.cut(std::min<std::int64_t>(part.first, 37), columns);
    const View rows = model.table().find("lm_head.weight")->in(model.values());
    const std::vector<double> mine = download<double>(*device, rows.row_slice(part.first, part.rows));
    device->upload(rows.row_slice(0, part.rows), mine.data());
  }
  const ConstView dhidden = head.forward_backward(hidden.view(), labels.view(), &teacher, 1.0 / positions);
  return {head.take_sums(), download<double>(*device, dhidden),
          download<double>(*device, model.head_gradient(columns))};
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

}  // namespace

TEST_CASE("the chunk size does not change loss and gradients", "[head_loss]") {
  const Result whole = run(23);
  CHECK(whole.sums[LossTerms::cross_entropy] > 0);
  CHECK(whole.sums[LossTerms::divergence] > 0);
  for (const std::int64_t chunk : {1, 4, 8, 22, 64}) {
    CAPTURE(chunk);
    const Result cut = run(chunk);
    for (int i = 0; i < LossTerms::count; ++i)
      CHECK(cut.sums[std::size_t(i)] == Approx(whole.sums[std::size_t(i)]).epsilon(1e-13));
    CHECK(distance(cut.dhidden, whole.dhidden) < 1e-14);
    CHECK(distance(cut.dhead, whole.dhead) < 1e-13);
  }
}

TEST_CASE("a head cut over ranks gives the loss and the gradients of the whole", "[head_loss]") {
  const Result whole = run(8);
  const int ranks = GENERATE(2, 3, 4);
  std::vector<Result> parts(static_cast<std::size_t>(ranks));
  run_ranks(ranks, [&](Communicator& group) { parts[std::size_t(group.rank())] = run(8, &group); });
  std::vector<double> dhead;
  for (const Result& part : parts) {
    CHECK(part.sums == parts[0].sums);
    CHECK(part.dhidden == parts[0].dhidden);
    dhead.insert(dhead.end(), part.dhead.begin(), part.dhead.end());
  }
  for (int i = 0; i < LossTerms::count; ++i)
    CHECK(parts[0].sums[std::size_t(i)] == Approx(whole.sums[std::size_t(i)]).epsilon(1e-13));
  CHECK(distance(parts[0].dhidden, whole.dhidden) < 1e-14);
  REQUIRE(dhead.size() == whole.dhead.size());
  CHECK(distance(dhead, whole.dhead) < 1e-13);
}

TEST_CASE("the vocabulary's parts are the same ids in models of other padding", "[head_loss]") {
  for (const std::int64_t real : {1, 7, 37, 1000, 1024, 2049, 151665})
    for (const int size : {1, 2, 3, 4, 8})
      for (const std::int64_t padding : {0, 1, 271, 399}) {
        CAPTURE(real, size, padding);
        std::int64_t next = 0, next_id = 0;
        for (int rank = 0; rank < size; ++rank) {
          const VocabularyPart part = vocabulary_part(real, real + padding, size, rank);
          CHECK(part.first == next);
          next += part.rows;
          CHECK(part.columns <= part.rows);
          const std::int64_t ids = std::min(std::max<std::int64_t>(real - part.first, 0), part.columns);
          const VocabularyPart tight = vocabulary_part(real, real, size, rank);
          CHECK(std::min(std::max<std::int64_t>(real - tight.first, 0), tight.columns) == ids);
          if (ids > 0) CHECK((part.first == next_id && tight.first == next_id));
          if (ids == 0) CHECK(part.columns == 0);
          next_id += ids;
        }
        CHECK(next == real + padding);
        CHECK(next_id == real);
      }
  CHECK(vocabulary_part(151665, 151936, 1, 0).columns == 151680);
  CHECK(vocabulary_part(151665, 152064, 2, 1).first == 75840);
  CHECK(vocabulary_part(151665, 152064, 2, 1).rows == 152064 - 75840);
  CHECK(vocabulary_part(151665, 152064, 2, 1).columns == 75840);
}

TEST_CASE("the default chunk keeps logits and their gradient within 384 MiB and 512 positions", "[head_loss]") {
  CHECK(default_logits_chunk(4096, DType::bf16) == 512);
  for (const std::int64_t columns : {32000, 128256, 151680, 256000})
    for (const DType dtype : {DType::bf16, DType::f32}) {
      const std::int64_t chunk = default_logits_chunk(columns, dtype);
      CHECK(chunk % 64 == 0);
      CHECK(chunk >= 128);
      CHECK(chunk * columns * std::int64_t(4 + size_of(dtype)) <= 384ll << 20);
    }
}
