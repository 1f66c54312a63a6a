// A small test framework for the C++ tests. googletest comes in no package
// that this build pins.
//
//   XLA_OPS_TEST(AddsNumbers) {
//     EXPECT_EQ(1 + 1, 2);
//   }
//   XLA_OPS_TEST_MAIN()
//
// Expectations that fail are printed with file and line, and the test goes
// on. The program returns 1 if any test failed or if none ran; arguments
// choose tests by a part of their name. Only for files that end in
// _test.cc.

#ifndef XLA_OPS_CC_CORE_TESTING_H_
#define XLA_OPS_CC_CORE_TESTING_H_

#include <chrono>  // NOLINT
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace xla_ops::testing {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& Tests() {
  static auto* tests = new std::vector<Test>;
  return *tests;
}

// Expectations may fail in any test, in the main thread only.
inline int& Failures() {
  static int failures = 0;
  return failures;
}

struct Registration {
  Registration(const char* name, void (*run)()) {
    Tests().push_back({name, run});
  }
};

inline void Fail(const char* file, int line, const std::string& text) {
  // A broken kernel fails for each of its elements; the first tell enough.
  if (++Failures() <= 20) {
    std::printf("%s:%d: %s\n", file, line, text.c_str());
  }
}

template <typename T>
std::string Show(const T& value) {
  std::ostringstream text;
  text.precision(9);
  if constexpr (std::is_enum_v<T>) {
    text << static_cast<int>(value);
  } else {
    text << value;
  }
  return text.str();
}

template <typename A, typename B>
void ExpectEq(const char* file, int line, const char* what, const A& got,
              const B& want) {
  if (got == want) return;
  Fail(file, line,
       std::string(what) + ":\n  got  " + Show(got) + "\n  want " + Show(want));
}

inline int RunTests(int argc, char** argv) {
  int run = 0;
  int failed = 0;
  for (const Test& test : Tests()) {
    bool chosen = argc < 2;
    for (int i = 1; i < argc; ++i) {
      chosen = chosen || std::strstr(test.name, argv[i]) != nullptr;
    }
    if (!chosen) continue;
    const auto start = std::chrono::steady_clock::now();
    Failures() = 0;
    test.run();
    const std::chrono::duration<double, std::milli> took =
        std::chrono::steady_clock::now() - start;
    ++run;
    failed += Failures() > 0;
    std::printf("%s %s (%.0f ms, %d failures)\n",
                Failures() > 0 ? "FAIL" : "ok  ", test.name, took.count(),
                Failures());
  }
  std::printf("%d of %d tests failed\n", failed, run);
  if (run == 0) std::printf("no test ran\n");
  return failed > 0 || run == 0 ? 1 : 0;
}

}  // namespace xla_ops::testing

#define XLA_OPS_TEST(name)                                                     \
  static void Test##name();                                                    \
  static const ::xla_ops::testing::Registration registered_##name(#name,       \
                                                                  Test##name); \
  static void Test##name()

#define XLA_OPS_TEST_MAIN()                          \
  int main(int argc, char** argv) {                  \
    return ::xla_ops::testing::RunTests(argc, argv); \
  }

#define EXPECT_EQ(got, want) \
  ::xla_ops::testing::ExpectEq(__FILE__, __LINE__, #got " == " #want, got, want)

#define EXPECT_TRUE(condition)                                               \
  do {                                                                       \
    if (!(condition)) {                                                      \
      ::xla_ops::testing::Fail(__FILE__, __LINE__, "not true: " #condition); \
    }                                                                        \
  } while (false)

#endif  // XLA_OPS_CC_CORE_TESTING_H_
