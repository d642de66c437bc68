package node

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// nsfs is the magic of files that are namespaces (linux/magic.h).
const nsfs = 0x6e736673

// openNetns opens the network namespace that a path stands for. It fails with an error that is os.ErrNotExist where it is none any more.
func openNetns(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		f.Close()
		return nil, err
	}
	if fs.Type != nsfs {
		f.Close()
		return nil, fmt.Errorf("%s is no namespace any more: %w", path, os.ErrNotExist)
	}
	return f, nil
}

// sameFile reports whether two files are the same, such as one namespace.
func sameFile(a, b *os.File) (bool, error) {
	x, err := a.Stat()
	if err != nil {
		return false, err
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y), err
}

// enter has the calling thread, which must be locked and not be used for anything else afterwards, enter a network namespace that is not the
// process's own.
func enter(netns *os.File) error {
	// Not that of the process, whose first thread may be one that has entered a pod.
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	same, err := sameFile(own, netns)
	if err != nil {
		return err
	}
	if same {
		return errors.New("the pod's network namespace is the node's own")
	}
	if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s (needs CAP_SYS_ADMIN): %w", netns.Name(), err)
	}
	return nil
}

// inside runs f on a thread in a network namespace.
func inside(path string, f func() error) error {
	netns, err := openNetns(path)
	if err != nil {
		return err
	}
	defer netns.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := enter(netns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}
