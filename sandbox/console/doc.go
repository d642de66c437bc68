// Package console lets commands from other terminals into the pods of a running sandbox.
//
//	mantlet sandbox --watch                          mantlet sandbox exec shop/web-0 -- curl db:5432
//	  outer: Listen, an abstract socket ◄──connect──── Dial: finds it, checks whose it is
//	    │ passed in by netns.Reenter                     │ stdin, stdout, stderr as files (SCM_RIGHTS), then JSON
//	  inner: Serve ── Host.Exec ── process in the pod ◄──┘ signals in; exit code back
//
// The socket has no file, so that nothing is left behind however the sandbox ends. It is in the machine's network namespace, where
// everybody can connect to it: both ends ask the kernel for the other's user (SO_PEERCRED), and talk to their own user alone.
//
// A shell gets a pseudo terminal. The caller makes it and passes it like any other file, so that the sandbox needs no /dev/pts.
package console
