package netns

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Network namespaces belong to threads. Code for another namespace runs on a thread of its own; never on the process's first one, whose
// namespace is what /proc/PID/ns/net and /proc/net show of the whole process.

// onThread runs f on a thread that no other goroutine uses. What f changes of the thread (namespace, capabilities, no_new_privs) ends
// with it.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		if unix.Gettid() != os.Getpid() {
			done <- f()
			return
		}
		done <- onThread(f) // while this goroutine holds the first thread, the next one cannot get it
		runtime.UnlockOSThread()
	}()
	return <-done
}

// inNamespace runs f on a thread in a network namespace. Sockets, netlink calls and processes that f makes are of that namespace;
// goroutines that f starts are not.
func inNamespace(ns *os.File, f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", ns.Name(), err)
		}
		return f()
	})
}

// newNamespace makes an anonymous network namespace, which lives as long as the returned file or a process in it, and runs prepare in it.
func newNamespace(name string, prepare func() error) (*os.File, error) {
	var ns *os.File
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace %s: %w", name, err)
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open network namespace %s: %w", name, err)
		}
		ns = os.NewFile(uintptr(fd), name)
		return prepare()
	})
	if err != nil && ns != nil {
		_ = ns.Close()
	}
	return ns, err
}
