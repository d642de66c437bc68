package agent

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/podtest"
)

// tinyDisk mounts a file system of a few pages until the test ends; fill leaves no room on it.
func tinyDisk(t *testing.T, dir string) (fill func()) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tiny", dir, "tmpfs", 0, "size=64k,mode=0755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return func() {
		t.Helper()
		f, err := os.Create(filepath.Join(dir, "ballast"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for err == nil {
			_, err = f.Write(bytes.Repeat([]byte("x"), 4096))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("the disk does not become full: %v", err)
		}
	}
}

// A disk that is full when the agent starts: it says so and ends, and the pod is closed.
func TestDiskFullAtStart(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	echo(t, w.outside.Listen(t, "[::]:9090"))
	disk := filepath.Join(podtest.Dir(t), "disk")
	tinyDisk(t, disk)()
	w.cfg.RunDir = filepath.Join(disk, "run")
	w.t.Cleanup(func() { cleanRedirect(t) })
	err := Run(t.Context(), w.cfg)
	if err == nil || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "envoy bootstrap") {
		t.Errorf("the agent ended with %v, which does not name what it could not write", err)
	}
	w.refused("after an agent that could not write")
}

// A disk that fills up later: everything stays enforced, an Envoy that dies comes back, and what is lost is said.
func TestDiskFullLater(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	disk := filepath.Join(podtest.Dir(t), "disk")
	fill := tinyDisk(t, disk)
	w.cfg.RunDir = filepath.Join(disk, "run")
	out, err := os.OpenFile(filepath.Join(disk, "flows"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w.cfg.Flows = out
	w.startPlane()
	w.startAgent()
	w.ready()
	fill()
	enforced := func() {
		t.Helper()
		for _, address := range []string{"10.99.0.2:8080", "[fd99::2]:8080"} {
			c, err := w.peer(address)
			if err != nil {
				t.Fatal(err)
			}
			if got := greeted(t, c); got != "hello\n" {
				t.Errorf("%s, with a full disk: %q", address, got)
			}
			c.Close()
		}
		denied, err := dial(t, "10.99.0.1:9091")
		if err == nil {
			if n, _ := io.Copy(io.Discard, denied); n != 0 {
				t.Errorf("%d bytes from where policy does not let the pod go", n)
			}
		}
	}
	enforced()
	w.log.await(t, "word of the lost records", func(s string) bool {
		return strings.Contains(s, "flows: records lost") && strings.Contains(s, "no space left on device")
	})
	killEnvoy(t, w)
	w.log.await(t, "death", func(s string) bool { return strings.Contains(s, "signal: killed") })
	if err := Ready(t.Context(), w.cfg.RunDir, patience); err != nil {
		t.Fatal(err)
	}
	enforced()
}
