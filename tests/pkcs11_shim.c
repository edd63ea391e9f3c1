/* A PKCS#11 module that fails on demand: wraps a real one, and does to each call what a file says.
 *
 * KEYBROKER_SHIM_MODULE  the real module.
 * KEYBROKER_SHIM_ORDERS  a file of orders, read again at each call, so that it can change while a process runs. One order a line,
 *                        FUNCTION WHAT NUMBER COUNT, and what comes after the fourth word only makes lines differ. The first order for
 *                        the function that is not spent is obeyed. COUNT is how often, over all processes together; -1 is always.
 * KEYBROKER_SHIM_CALLS   a directory: the size of the file named like a function is how often it was called. `forked` counts calls
 *                        by another process than the one that called C_Initialize.
 *
 * WHAT, for every function:
 *   before  return NUMBER without calling the real function
 *   after   call the real function, then return NUMBER
 *   hang    never return
 *   hung    call the real function, then never return
 *   delay   wait NUMBER milliseconds, then call the real function
 * and for C_Sign, where the signature is returned (its first call in python-pkcs11 only asks for the length: C_Sign_length):
 *   flip    flip a bit of the signature
 *   zero    a signature of zeros
 *   short   a signature that is NUMBER bytes too short
 *   long    a signature that is NUMBER bytes too long
 *   nothing CKR_OK, and nothing written: neither signature nor length */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long CK_ULONG, CK_RV;
typedef unsigned char CK_BYTE;
/* CK_FUNCTION_LIST of PKCS#11 2.40: a version, then pointers in a fixed order. */
typedef struct { CK_BYTE major, minor; void *functions[68]; } CK_FUNCTION_LIST;
enum { NONE, BEFORE, AFTER, HANG, HUNG, DELAY, FLIP, ZERO, SHORT, LONG, NOTHING };
static const char *const words[] = { "", "before", "after", "hang", "hung", "delay", "flip", "zero", "short", "long", "nothing" };

static CK_FUNCTION_LIST *real, list;
static pid_t initialised_in;

/* Append a byte to a file; its size then, exact among all processes. */
static long count(const char *directory, const char *name) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", directory, name);
  int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (file < 0 || write(file, "x", 1) != 1) abort();
  long size = lseek(file, 0, SEEK_CUR);
  close(file);
  return size;
}

static int is_left(const char *line, int allowed) {
  char name[32];
  unsigned long hash = 5381;
  if (allowed < 0) return 1;
  for (const char *c = line; *c; c++) hash = hash * 33 ^ (CK_BYTE)*c;
  snprintf(name, sizeof name, "spent-%lx", hash);
  return count(getenv("KEYBROKER_SHIM_CALLS"), name) <= allowed;
}

/* What to do to this call. */
static int ordered(const char *function, CK_ULONG *number) {
  char line[256], name[32], what[16];
  int allowed, found = NONE;
  count(getenv("KEYBROKER_SHIM_CALLS"), function);
  if (initialised_in && getpid() != initialised_in) {
    count(getenv("KEYBROKER_SHIM_CALLS"), "forked");
    *number = 0x5; /* CKR_GENERAL_ERROR */
    return BEFORE;
  }
  FILE *file = fopen(getenv("KEYBROKER_SHIM_ORDERS"), "re");
  while (file && found == NONE && fgets(line, sizeof line, file)) {
    if (sscanf(line, "%31s %15s %li %d", name, what, (long *)number, &allowed) != 4 || strcmp(name, function)) continue;
    if (!is_left(line, allowed)) continue;
    for (found = NOTHING; found > NONE && strcmp(words[found], what); found--) {}
  }
  if (file) fclose(file);
  if (found == DELAY) usleep(*number * 1000);
  while (found == HANG) pause();
  return found;
}

static CK_RV answer(int what, CK_ULONG number, CK_RV result) {
  while (what == HUNG) pause();
  return what == AFTER ? number : result;
}

#define WRAP(NAME, INDEX, PARAMETERS, ARGUMENTS)                                      \
  static CK_RV NAME PARAMETERS {                                                      \
    CK_ULONG number = 0;                                                              \
    int what = ordered(#NAME, &number);                                               \
    if (what == BEFORE) return number;                                                \
    return answer(what, number, ((CK_RV(*) PARAMETERS) real->functions[INDEX]) ARGUMENTS); \
  }

WRAP(C_Finalize, 1, (void *reserved), (reserved))
WRAP(C_GetSlotList, 4, (CK_BYTE present, CK_ULONG *slots, CK_ULONG *n), (present, slots, n))
WRAP(C_GetSlotInfo, 5, (CK_ULONG slot, void *info), (slot, info))
WRAP(C_GetTokenInfo, 6, (CK_ULONG slot, void *info), (slot, info))
WRAP(C_OpenSession, 12, (CK_ULONG slot, CK_ULONG flags, void *a, void *f, CK_ULONG *session), (slot, flags, a, f, session))
WRAP(C_CloseSession, 13, (CK_ULONG session), (session))
WRAP(C_Login, 18, (CK_ULONG session, CK_ULONG user, CK_BYTE *pin, CK_ULONG n), (session, user, pin, n))
WRAP(C_Logout, 19, (CK_ULONG session), (session))
WRAP(C_GetAttributeValue, 24, (CK_ULONG session, CK_ULONG object, void *template, CK_ULONG n), (session, object, template, n))
WRAP(C_FindObjectsInit, 26, (CK_ULONG session, void *template, CK_ULONG n), (session, template, n))
WRAP(C_FindObjects, 27, (CK_ULONG session, CK_ULONG *objects, CK_ULONG max, CK_ULONG *n), (session, objects, max, n))
WRAP(C_FindObjectsFinal, 28, (CK_ULONG session), (session))
WRAP(C_SignInit, 42, (CK_ULONG session, void *mechanism, CK_ULONG key), (session, mechanism, key))
WRAP(C_GenerateRandom, 64, (CK_ULONG session, CK_BYTE *data, CK_ULONG n), (session, data, n))

static CK_RV C_Initialize(void *arguments) {
  CK_ULONG number = 0;
  int what = ordered("C_Initialize", &number);
  if (what == BEFORE) return number;
  initialised_in = getpid();
  return answer(what, number, ((CK_RV(*)(void *)) real->functions[0])(arguments));
}

static CK_RV C_Sign(CK_ULONG session, CK_BYTE *data, CK_ULONG n, CK_BYTE *signature, CK_ULONG *size) {
  CK_ULONG number = 0;
  int what = ordered(signature ? "C_Sign" : "C_Sign_length", &number);
  if (what == BEFORE) return number;
  if (what == NOTHING) return 0;
  CK_RV result = ((CK_RV(*)(CK_ULONG, CK_BYTE *, CK_ULONG, CK_BYTE *, CK_ULONG *)) real->functions[43])(session, data, n, signature, size);
  if (what == FLIP) signature[*size / 2] ^= 1;
  if (what == ZERO) memset(signature, 0, *size);
  if (what == LONG) *size += number;
  if (what == SHORT) *size -= number;
  return answer(what, number, result);
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **out) {
  void *module = dlopen(getenv("KEYBROKER_SHIM_MODULE"), RTLD_NOW | RTLD_LOCAL);
  CK_RV (*get)(CK_FUNCTION_LIST **) = module ? (CK_RV(*)(CK_FUNCTION_LIST **)) dlsym(module, "C_GetFunctionList") : NULL;
  if (!get || get(&real)) return 0x5;
  list = *real;
  void *const wrapped[68] = {
    [0] = C_Initialize, [1] = C_Finalize, [4] = C_GetSlotList, [5] = C_GetSlotInfo, [6] = C_GetTokenInfo, [12] = C_OpenSession,
    [13] = C_CloseSession, [18] = C_Login, [19] = C_Logout, [24] = C_GetAttributeValue, [26] = C_FindObjectsInit, [27] = C_FindObjects,
    [28] = C_FindObjectsFinal, [42] = C_SignInit, [43] = C_Sign, [64] = C_GenerateRandom,
  };
  for (int index = 0; index < 68; index++) {
    if (wrapped[index]) list.functions[index] = wrapped[index];
  }
  *out = &list;
  return 0;
}
