// Package binaries builds what a Kubernetes cluster is made of from pinned Go modules, once: Kubernetes itself, etcd, containerd, runc,
// CNI plugins, CoreDNS, the upstream end-to-end suite.
//
// Each directory below this one has a go.mod of its own, so that nothing of it gets into Mantlet's module graph; `go get` and
// `go mod tidy` work there as anywhere. What was built stands in the user's cache directory under a hash of the pins:
//
//	~/.cache/mantlet/binaries/kubernetes-3f0c…/kube-apiserver
//
// A change of the pins builds anew, a change of Go's version does not.
package binaries

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

const self = "github.com/mantlet/mantlet/test/cluster/binaries"

// Path returns the absolute path of a binary, which it builds if it is not in the cache: up to some minutes. Of processes that ask at the
// same time one builds, and the others wait. The working directory has to be in Mantlet's module, where the pins are.
func Path(ctx context.Context, log *slog.Logger, name string) (string, error) {
	p, err := find(name)
	if err != nil {
		return "", err
	}
	pinned, err := source(ctx)
	if err != nil {
		return "", fmt.Errorf("binary %s: %w", name, err)
	}
	p = p.onThisMachine(ctx, log)
	directory, err := p.directory(pinned)
	if err != nil {
		return "", fmt.Errorf("binary %s: %w", name, err)
	}
	built := filepath.Join(directory, name)
	if exists(built) {
		return built, nil
	}
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return "", fmt.Errorf("binary %s: %w", name, err)
	}
	unlock, err := lock(ctx, filepath.Join(directory, "."+name+".lock"))
	if err != nil {
		return "", fmt.Errorf("binary %s: %w", name, err)
	}
	defer unlock()
	if exists(built) { // by whom we waited for
		return built, nil
	}
	if err := p.build(ctx, log, filepath.Join(pinned, p.module), built); err != nil {
		return "", fmt.Errorf("binary %s: %w", name, err)
	}
	return built, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// source is the directory of this package, where the pins are: they are other modules' files, and cannot be embedded.
func source(ctx context.Context) (string, error) {
	out, err := run(ctx, "", "go", "list", "-f", "{{.Dir}}", self)
	if err != nil {
		return "", fmt.Errorf("find the pins: %w\n  hint: run this from within Mantlet's source tree", err)
	}
	return out, nil
}

// onThisMachine settles how a pin is built here.
func (p pin) onThisMachine(ctx context.Context, log *slog.Logger) pin {
	if p.compile != withSeccomp {
		return p
	}
	p.compile = withC
	if _, err := run(ctx, "", "pkg-config", "--exists", "libseccomp"); err != nil {
		log.Warn("runc without seccomp: pods with seccompProfile RuntimeDefault, and so Pod Security restricted, will not start",
			"hint", "apt-get install libseccomp-dev pkg-config")
		return p
	}
	p.tags = "seccomp"
	return p
}

// directory is where the pin's binaries are kept: by all that makes them what they are, except Go itself.
func (p pin) directory(pinned string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	fmt.Fprintln(hash, runtime.GOOS, runtime.GOARCH)
	for _, other := range pins { // those of one module share a directory, as containerd and its shim must
		if other.module == p.module {
			if other.name == p.name {
				other = p
			}
			fmt.Fprintln(hash, other.arguments("v0.0.0"))
		}
	}
	files, err := filepath.Glob(filepath.Join(pinned, p.module, "*")) // sorted
	if err != nil {
		return "", err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(hash, "%s %d\n%s", filepath.Base(file), len(text), text)
	}
	return filepath.Join(cache, "mantlet", "binaries", fmt.Sprintf("%s-%x", p.module, hash.Sum(nil)[:8])), nil
}

// build ends in a rename: a build that was interrupted leaves no half of a binary.
func (p pin) build(ctx context.Context, log *slog.Logger, module, target string) error {
	cgo := "CGO_ENABLED=0"
	if p.compile == withC {
		cgo = "CGO_ENABLED=1"
		if _, err := exec.LookPath("gcc"); err != nil {
			return errors.New("it needs a C compiler, and there is no gcc\n  hint: apt-get install gcc libc6-dev")
		}
	}
	version := ""
	if p.stamp != "" {
		var err error
		if version, err = run(ctx, module, "go", "list", "-m", "-f", "{{.Version}}", p.stamp); err != nil {
			return err
		}
	}
	scratch, err := os.MkdirTemp(filepath.Dir(target), ".build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch) //nolint:errcheck // what is left there is in nobody's way
	log.Info("building a binary, once", "name", p.name, "package", p.pkg)
	began := time.Now()
	args := p.arguments(version)
	args = append(args[:len(args)-1:len(args)-1], "-o", filepath.Join(scratch, p.name), p.pkg)
	if _, err := run(ctx, module, "env", append([]string{cgo, "GOWORK=off", "go"}, args...)...); err != nil {
		return err
	}
	log.Info("built", "name", p.name, "took", time.Since(began).Round(100*time.Millisecond))
	return os.Rename(filepath.Join(scratch, p.name), target)
}

// run returns what a command writes, without the space around it.
func run(ctx context.Context, directory, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = directory
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return strings.TrimSpace(out.String()), nil
}
