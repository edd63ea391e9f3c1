/* A PKCS#11 module that fails on demand: wraps a real one, and does to C_Sign, C_SignInit, C_Login and C_OpenSession what a file says.
 *
 * The file named by KEYBROKER_SHIM_ORDERS holds one line, read at each call: FUNCTION WHEN CODE COUNT, for example
 *   C_Sign before 0x30 1     return CKR_DEVICE_ERROR once, without calling the real function
 *   C_Sign after 0x5 -1      call the real function, then return CKR_GENERAL_ERROR, always
 *   C_Sign hang 0 1          never return, once
 *   C_Sign flip 0 1          call the real function, then flip a bit of the signature
 * Calls to C_Login are counted in the file KEYBROKER_SHIM_LOGINS, one byte each. */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long CK_ULONG, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID, CK_OBJECT_HANDLE, CK_USER_TYPE, CK_FLAGS;
typedef unsigned char CK_BYTE;
typedef struct { CK_BYTE major, minor; } CK_VERSION;
/* CK_FUNCTION_LIST of PKCS#11 2.40: a version, then pointers in a fixed order. */
typedef struct { CK_VERSION version; void *functions[68]; } CK_FUNCTION_LIST;
enum { LOGIN = 18, OPEN_SESSION = 12, SIGN_INIT = 42, SIGN = 43 };

static CK_FUNCTION_LIST *real, list;
static int spent;
static char last[256];
static pid_t loaded_in;

static const char *order(const char *function, CK_RV *code) {
  static char when[16];
  char line[256] = "", name[32] = "";
  int count = 0;
  FILE *file = fopen(getenv("KEYBROKER_SHIM_ORDERS"), "r");
  if (getpid() != loaded_in) { *code = 0x191; return "before"; } /* used after a fork: CKR_CRYPTOKI_ALREADY_INITIALIZED */
  if (!file) return "";
  if (!fgets(line, sizeof line, file)) line[0] = 0;
  fclose(file);
  if (strcmp(line, last)) { strcpy(last, line); spent = 0; }
  if (sscanf(line, "%31s %15s %lx %d", name, when, code, &count) != 4 || strcmp(name, function)) return "";
  if (count >= 0 && spent >= count) return "";
  spent++;
  return when;
}

#define WRAP(NAME, INDEX, PARAMETERS, ARGUMENTS)                       \
  static CK_RV NAME PARAMETERS {                                       \
    CK_RV code = 0, result;                                            \
    const char *when = order(#NAME, &code);                            \
    while (!strcmp(when, "hang")) pause();                             \
    if (!strcmp(when, "before")) return code;                          \
    result = ((CK_RV(*) PARAMETERS) real->functions[INDEX]) ARGUMENTS; \
    return strcmp(when, "after") ? result : code;                      \
  }

WRAP(C_OpenSession, OPEN_SESSION, (CK_SLOT_ID s, CK_FLAGS f, void *a, void *n, CK_SESSION_HANDLE *h), (s, f, a, n, h))
WRAP(C_SignInit, SIGN_INIT, (CK_SESSION_HANDLE s, void *m, CK_OBJECT_HANDLE k), (s, m, k))

static CK_RV C_Login(CK_SESSION_HANDLE s, CK_USER_TYPE u, CK_BYTE *p, CK_ULONG n) {
  CK_RV code = 0;
  int log = open(getenv("KEYBROKER_SHIM_LOGINS"), O_WRONLY | O_CREAT | O_APPEND, 0600);
  const char *when = order("C_Login", &code);
  if (write(log, "x", 1) != 1) abort();
  close(log);
  while (!strcmp(when, "hang")) pause();
  if (!strcmp(when, "before")) return code;
  return ((CK_RV(*)(CK_SESSION_HANDLE, CK_USER_TYPE, CK_BYTE *, CK_ULONG)) real->functions[LOGIN])(s, u, p, n);
}

static CK_RV C_Sign(CK_SESSION_HANDLE s, CK_BYTE *d, CK_ULONG n, CK_BYTE *sig, CK_ULONG *size) {
  CK_RV code = 0, result;
  const char *when = sig ? order("C_Sign", &code) : ""; /* the first call only asks for the length */
  while (!strcmp(when, "hang")) pause();
  if (!strcmp(when, "before")) return code;
  result = ((CK_RV(*)(CK_SESSION_HANDLE, CK_BYTE *, CK_ULONG, CK_BYTE *, CK_ULONG *)) real->functions[SIGN])(s, d, n, sig, size);
  if (!strcmp(when, "flip")) sig[*size - 1] ^= 1;
  if (!strcmp(when, "zero")) memset(sig, 0, *size);
  return strcmp(when, "after") ? result : code;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **out) {
  void *module = dlopen(getenv("KEYBROKER_SHIM_MODULE"), RTLD_NOW | RTLD_LOCAL);
  CK_RV (*get)(CK_FUNCTION_LIST **) = module ? (CK_RV(*)(CK_FUNCTION_LIST **)) dlsym(module, "C_GetFunctionList") : NULL;
  if (!get || get(&real)) return 0x5;
  loaded_in = getpid();
  list = *real;
  list.functions[LOGIN] = C_Login;
  list.functions[OPEN_SESSION] = C_OpenSession;
  list.functions[SIGN_INIT] = C_SignInit;
  list.functions[SIGN] = C_Sign;
  *out = &list;
  return 0;
}
