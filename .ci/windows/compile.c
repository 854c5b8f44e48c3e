// Compiles CUDA sources with the NVRTC of a folder of DLLs: compile.exe FOLDER DLL JOBS. Each line of the file JOBS is
// SOURCE OUTPUT OPTION..., separated by tabs.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

typedef void* Program;

static HMODULE library;
static int call_failed(const char* name, int result) {
  if (result) fprintf(stderr, "%s: error %d\n", name, result);
  return result;
}
#define CALL(name, types, ...) call_failed(#name, ((int(*) types)(void*)GetProcAddress(library, #name))(__VA_ARGS__))

static char* read_file(const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) return NULL;
  fseek(file, 0, SEEK_END);
  const size_t size = (size_t)ftell(file);
  rewind(file);
  char* text = calloc(size + 1, 1);
  fread(text, 1, size, file);
  fclose(file);
  return text;
}

static int compile(const char* source, const char* output, int count, const char** options) {
  Program program;
  const char* name = strrchr(source, '/') + 1;
  char* text = read_file(source);
  if (!text) return 1;
  if (CALL(nvrtcCreateProgram, (Program*, const char*, const char*, int, void*, void*), &program, text, name, 0, NULL,
           NULL))
    return 1;
  if (CALL(nvrtcCompileProgram, (Program, int, const char**), program, count, options)) {
    size_t size = 0;
    CALL(nvrtcGetProgramLogSize, (Program, size_t*), program, &size);
    char* log = calloc(size + 1, 1);
    CALL(nvrtcGetProgramLog, (Program, char*), program, log);
    fprintf(stderr, "%s: %s\n", source, log);
    return 1;
  }
  const int ptx = strstr(options[0], "=compute_") != NULL;
  size_t size = 0;
  if (ptx ? CALL(nvrtcGetPTXSize, (Program, size_t*), program, &size)
          : CALL(nvrtcGetCUBINSize, (Program, size_t*), program, &size))
    return 1;
  char* code = malloc(size);
  if (ptx ? CALL(nvrtcGetPTX, (Program, char*), program, code) : CALL(nvrtcGetCUBIN, (Program, char*), program, code))
    return 1;
  FILE* file = fopen(output, "wb");
  if (!file) return 1;
  fwrite(code, 1, size - (size_t)ptx, file);  // without the zero that ends PTX
  fclose(file);
  CALL(nvrtcDestroyProgram, (Program*), &program);
  free(text);
  free(code);
  return 0;
}

int main(int count, char** arguments) {
  if (count != 4) return 2;
  SetDllDirectoryA(arguments[1]);
  library = LoadLibraryA(arguments[2]);
  FILE* jobs = fopen(arguments[3], "r");
  if (!library || !jobs) {
    fprintf(stderr, "cannot load %s (error %lu)\n", arguments[2], GetLastError());
    return 2;
  }
  int failed = 0;
  char line[4096];
  while (fgets(line, sizeof line, jobs)) {
    char* words[16];
    int n = 0;
    for (char* word = strtok(line, "\t\r\n"); word && n < 16; word = strtok(NULL, "\t\r\n")) words[n++] = word;
    if (n > 2) failed += compile(words[0], words[1], n - 2, (const char**)words + 2);
  }
  printf("%d failed\n", failed);
  return failed != 0;
}
