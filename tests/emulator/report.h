// What is told when a launch fails: where a thread did what it must not, or where all of them wait.
#pragma once

#include <dlfcn.h>
#include <execinfo.h>

#include <algorithm>
#include <tuple>

#include "memory.h"

namespace emulator {

// Buffers that reports name.
struct Buffer {
  std::string name;
  const char* begin;
  size_t bytes;
};
static std::vector<Buffer> buffers;
static std::string report;

inline std::string text(const char* format, va_list list) {
  char out[400];
  vsnprintf(out, sizeof out, format, list);
  return out;
}
inline std::string text(const char* format, ...) {
  va_list list;
  va_start(list, format);
  const std::string out = text(format, list);
  va_end(list);
  return out;
}

// A demangled function's own name, without its scopes and any arguments.
inline std::string last_name(const char* function) {
  std::string out;
  int depth = 0;
  for (const char* c = function; *c && *c != '\n' && (depth || *c != '('); ++c) {
    depth += *c == '<';
    if (!depth) out += *c;
    depth -= *c == '>';
  }
  return out.substr(out.find_last_of(" :") + 1);
}
// The functions of the sources that an address lies in, innermost first; addr2line knows those that were inlined.
inline std::string functions_at(void* address) {
  Dl_info info;
  if (!address || !dladdr(address, &info) || !info.dli_fname) return "";
  const auto offset = (unsigned long)((char*)address - (char*)info.dli_fbase - 1);
  const std::string command = "addr2line -i -f -C -s -e '" + std::string(info.dli_fname) + "' ";
  FILE* pipe = popen((command + text("%lx 2>/dev/null", offset)).c_str(), "r");
  if (!pipe) return "";
  std::string out;
  char function[1000], place[300];
  while (fgets(function, sizeof function, pipe) && fgets(place, sizeof place, pipe)) {
    const std::string at(place, strcspn(place, " \n"));
    if (at.find(".cu") == std::string::npos) continue;
    out += (out.empty() ? "" : " < ") + last_name(function) + " " + at;
  }
  pclose(pipe);
  return out;
}
inline const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

// What a fiber waits for.
inline std::string subject(const Fiber& f) {
  const auto number = (unsigned)f.subject;
  if (f.wait == Wait::kBarrier)
    return text("barrier %u: %d of %u are there", number, f.block->barriers[number].arrived, f.detail);
  if (f.wait == Wait::kCollective) return text("mask %08x", number);
  if (f.wait == Wait::kMbarrier) {
    const auto* m = (const Mbarrier*)(f.block->shared + number);
    return text("shared %x, parity %u: phase %u, %u of %u and %d bytes to come", number, f.detail, m->phase, m->pending,
                m->expected, m->bytes);
  }
  if (f.wait != Wait::kPoll) return "";
  for (const Buffer& b : buffers) {
    const size_t at = (const char*)f.subject - b.begin;
    if (at < b.bytes) return text("%s, byte %zu", b.name.c_str(), at);
  }
  return text("address %p", (void*)f.subject);
}

// All threads that have not ended, by where and for what they wait.
inline void report_waits() {
  struct Group {
    const Fiber* first;
    int threads = 0;
    size_t first_warp = ~size_t{0}, last_warp = 0, first_block = ~size_t{0}, last_block = 0;
    std::map<std::string, int> subjects;
  };
  std::map<std::tuple<Wait, void*, int>, Group> groups;
  for (const Fiber& f : fibers) {
    if (f.wait == Wait::kExited) continue;
    Group& g = groups[{f.wait, f.caller, f.site.line}];
    if (!g.threads++) g.first = &f;
    const size_t block = f.block - blocks.data(), warp = f.warp->index;
    g.first_block = std::min(g.first_block, block), g.last_block = std::max(g.last_block, block);
    g.first_warp = std::min(g.first_warp, warp), g.last_warp = std::max(g.last_warp, warp);
    g.subjects[subject(f)]++;
  }
  for (const auto& [key, g] : groups) {
    const Fiber& f = *g.first;
    report += text("  %s: %d threads, within warps %zu to %zu of blocks %zu to %zu, at %s:%d\n", kWaits[(int)f.wait],
                   g.threads, g.first_warp, g.last_warp, g.first_block, g.last_block,
                   f.site.file ? base_name(f.site.file) : "?", f.site.line);
    if (const std::string functions = functions_at(f.caller); !functions.empty()) report += "      " + functions + "\n";
    int shown = 0;
    for (const auto& [what, threads] : g.subjects)
      if (!what.empty() && ++shown <= 4) report += text("      %s (%d threads)\n", what.c_str(), threads);
    if (shown > 4) report += text("      and %d more such\n", shown - 4);
  }
}

// Ends the launch from within a fiber.
[[noreturn]] __noinline__ inline void fail(Site site, const char* format, ...) {
  va_list list;
  va_start(list, format);
  failure = text(format, list);
  va_end(list);
  failure += text("\n  at %s:%d, in block %u, thread %u\n", base_name(site.file), site.line, blockIdx.x, threadIdx.x);
  failure_frames.resize(12);
  failure_frames.resize(backtrace(failure_frames.data(), 12));
  emulator_switch(&current->stack, scheduler_stack);
  __builtin_unreachable();
}
inline void report_failure() {
  report = failure;
  for (void* frame : failure_frames)
    if (const std::string functions = functions_at(frame); !functions.empty()) report += "    " + functions + "\n";
}

}  // namespace emulator
