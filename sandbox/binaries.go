package sandbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Binaries are the programs that run in pods.
type Binaries struct {
	Agent string // mantlet-agent
	Envoy string
}

// FindBinaries looks for the agent as $MANTLET_AGENT, beside this executable, and on PATH; for Envoy as $MANTLET_ENVOY, on PATH, and
// where `make envoy` puts it.
func FindBinaries() (Binaries, error) {
	self, err := os.Executable()
	if err != nil {
		return Binaries{}, err
	}
	dir := filepath.Dir(self)
	agent, err := find("mantlet-agent", "MANTLET_AGENT", nil, []string{filepath.Join(dir, "mantlet-agent")})
	if err != nil {
		return Binaries{}, fmt.Errorf("%w\n  hint: run `make build`, or set MANTLET_AGENT", err)
	}
	envoy, err := find("envoy", "MANTLET_ENVOY", []string{"envoy"}, []string{filepath.Join(dir, "..", ".cache", "envoy", "envoy"), ".cache/envoy/envoy"})
	if err != nil {
		return Binaries{}, fmt.Errorf("%w\n  hint: run `make envoy`, or set MANTLET_ENVOY", err)
	}
	return Binaries{Agent: agent, Envoy: envoy}, nil
}

func find(what, env string, onPath, places []string) (string, error) {
	if p := os.Getenv(env); p != "" {
		if _, err := os.Stat(p); err != nil {
			return "", fmt.Errorf("%s=%s: %w", env, p, err)
		}
		return filepath.Abs(p)
	}
	for _, name := range onPath {
		if p, err := exec.LookPath(name); err == nil {
			return filepath.Abs(p)
		}
	}
	for _, p := range places {
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return filepath.Abs(p)
		}
	}
	return "", fmt.Errorf("%s was not found", what)
}

// reachable makes a program executable for every user of the enclosure, whatever the folders above it allow (a home folder is often
// closed to others): it is bound to a place in the run directory.
func reachable(program, at string) error {
	f, err := os.OpenFile(at, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Close(), unix.Mount(program, at, "", unix.MS_BIND, "")); err != nil {
		return fmt.Errorf("bind %s to %s: %w", program, at, err)
	}
	return nil
}
