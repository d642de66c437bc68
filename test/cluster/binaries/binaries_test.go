package binaries

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Many ask for one binary at once, as packages under test do: it is built once, and it runs.
func TestPathBuildsOnce(t *testing.T) {
	goCache, err := run(t.Context(), "", "go", "env", "GOCACHE") // stays where it is when the user's cache is another
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOCACHE", goCache)
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	var said strings.Builder
	var mu sync.Mutex
	log := slog.New(slog.NewTextHandler(lockedWriter{&mu, &said}, nil))
	var all sync.WaitGroup
	paths := make([]string, 4)
	for i := range paths {
		all.Go(func() {
			path, err := Path(t.Context(), log, "pause")
			if err != nil {
				t.Error(err)
			}
			paths[i] = path
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	if got := strings.Count(said.String(), "building a binary"); got != 1 {
		t.Errorf("built %d times:\n%s", got, &said)
	}
	if len(slices.Compact(slices.Clone(paths))) != 1 || !filepath.IsAbs(paths[0]) {
		t.Errorf("paths: %q", paths)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(paths[0]), ".build-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %q %v", left, err)
	}
	pause := exec.CommandContext(t.Context(), paths[0])
	if err := pause.Start(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(pause.Process.Signal(os.Interrupt), ignoreSignal(pause.Wait())); err != nil {
		t.Error(err)
	}
}

// ignoreSignal: the interrupt may come before the program has asked for it.
func ignoreSignal(err error) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && !exit.Exited() {
		return nil
	}
	return err
}

type lockedWriter struct {
	mu  *sync.Mutex
	out *strings.Builder
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out.Write(p)
}

func TestUnknown(t *testing.T) {
	_, err := Path(t.Context(), slog.New(slog.DiscardHandler), "kube-apisrver")
	if err == nil || !strings.Contains(err.Error(), `"kube-apisrver" is not pinned`) || !strings.Contains(err.Error(), "kube-apiserver,") {
		t.Errorf("got %v", err)
	}
}

func TestArguments(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"etcd", "build -trimpath -buildvcs=false -ldflags=-s -w go.etcd.io/etcd/server/v3"},
		{"kubelet", "build -trimpath -buildvcs=false -ldflags=-s -w" +
			" -X k8s.io/component-base/version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36" +
			" -X k8s.io/client-go/pkg/version.gitVersion=v1.36.3 -X k8s.io/client-go/pkg/version.gitMajor=1 -X k8s.io/client-go/pkg/version.gitMinor=36" +
			" k8s.io/kubernetes/cmd/kubelet"},
		{"containerd", "build -trimpath -buildvcs=false -tags=no_btrfs,no_devmapper,no_zfs -ldflags=-s -w github.com/containerd/containerd/v2/cmd/containerd"},
	} {
		p, err := find(c.name)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(p.arguments("v1.36.3"), " "); got != c.want {
			t.Errorf("%s:\ngot  %s\nwant %s", c.name, got, c.want)
		}
	}
}

// Every pin is of a module that is there, and one module's binaries stand in one directory, apart from the others'.
func TestDirectories(t *testing.T) {
	seen := map[string]string{}
	for _, p := range pins {
		if _, err := os.Stat(filepath.Join(p.module, "go.mod")); err != nil {
			t.Errorf("%s: %v", p.name, err)
		}
		d, err := p.directory(".")
		if err != nil {
			t.Fatal(err)
		}
		if before, ok := seen[p.module]; ok && before != d {
			t.Errorf("%s is in %s, others of its module in %s", p.name, d, before)
		}
		seen[p.module] = d
	}
	without, err := pin{name: "runc", module: "runc", compile: withC}.directory(".")
	if err != nil {
		t.Fatal(err)
	}
	with, err := pin{name: "runc", module: "runc", compile: withC, tags: "seccomp"}.directory(".")
	if err != nil {
		t.Fatal(err)
	}
	if with == without {
		t.Errorf("runc with and without seccomp are one: %s", with)
	}
}

func TestLockIsCalledOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a lock that is held: got %v", err)
	}
	unlock()
	again, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	again()
}
