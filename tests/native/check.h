// The tests' whole framework: TEST registers, CHECK reports and counts, check::run_all is main.
#pragma once

#include <exception>
#include <iostream>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test> tests;
inline int failures = 0;

struct Register {
  Register(const char* name, void (*run)()) { tests.push_back({name, run}); }
};

template <class... Parts>
void expect(bool ok, const char* file, int line, const char* what, const Parts&... context) {
  if (ok) return;
  ++failures;
  std::cout << file << ":" << line << ": failed: " << what;
  ((std::cout << " | ") << ... << context) << std::endl;
}

// Runs f and returns the message of the exception it throws; "" if it throws none.
template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Runs the tests and returns the process's exit status.
inline int run_all() {
  for (const Test& test : tests) {
    const int before = failures;
    const std::string thrown = message_of(test.run);
    expect(thrown.empty(), test.name, 0, "no exception", thrown);
    std::cout << (failures == before ? "passed  " : "FAILED  ") << test.name << std::endl;
  }
  return failures != 0 || tests.empty();
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const check::Register register_##name(#name, name); \
  static void name()
// CHECK(condition, context...): what follows the condition is printed, in a row, if it fails.
#define CHECK(condition, ...) \
  check::expect((condition), __FILE__, __LINE__, #condition, "" __VA_OPT__(, ) __VA_ARGS__)
