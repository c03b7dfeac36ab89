// Without LMCN_SEQ_POINTS the macro is nothing: it may even stand in a constant expression, and the class does not exist.
#undef LMCN_SEQ_POINTS
#include <gtest/gtest.h>

#include "base/seq_points.hpp"

namespace {

constexpr int passes_a_point() {
  LMCN_SEQ_POINT("test.not_there");
  return 1;
}

TEST(SeqPointsOff, CompilesToNothing) {
  static_assert(passes_a_point() == 1);
  EXPECT_EQ(passes_a_point(), 1);
}

}  // namespace
