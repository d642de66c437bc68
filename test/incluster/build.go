package incluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/mantlet/mantlet/test/cluster/images"
)

// Images of a World, beside those that every cluster has.
const (
	Image  = "localhost/mantlet:test"       // Mantlet's, as hack/image makes it
	Next   = "localhost/mantlet:next"       // Image with another agent, for upgrades: see World.LoadNext
	Client = "localhost/traffic:test"       // cmd/traffic, whose arguments say what it does
	Claims = "localhost/traffic-15150:test" // Client as an image can be that names a user of sidecars, here the one that they all were once: USER 15150:15150
	Server = images.Agnhost                 // serves its pod's name at /hostname with the arguments netexec, --http-port=8080
)

// build compiles Mantlet as `make build` does, so that what that made is taken from Go's cache, and returns the images' archives.
func build(ctx context.Context, directory string) ([]string, error) {
	root, err := sourceTree(ctx)
	if err != nil {
		return nil, err
	}
	if directory, err = filepath.Abs(directory); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return nil, err
	}
	err = gotool(ctx, root, "build", "-trimpath", "-o", directory+"/", "./cmd/mantlet", "./cmd/mantlet-agent", "./test/incluster/cmd/traffic")
	if err != nil {
		return nil, err
	}
	mantlet, client, claims := filepath.Join(directory, "mantlet.tar"), filepath.Join(directory, "traffic.tar"), filepath.Join(directory, "claims.tar")
	image := images.Image{Name: Client, Files: map[string]string{"/traffic": filepath.Join(directory, "traffic")}, Entrypoint: []string{"/traffic"}}
	named := image
	named.Name, named.User = Claims, "15150:15150"
	return []string{mantlet, client, claims}, together(
		func() error { return writeImage(ctx, root, directory, Image, mantlet) },
		func() error { return errors.Join(image.Write(client), named.Write(claims)) },
	)
}

// nextMark is what the agent of Next has at its end, where nobody reads it: it does the same, and is another file.
const nextMark = "the next version"

// next writes the archive of Next.
func next(ctx context.Context, parts string) (archive string, err error) {
	root, err := sourceTree(ctx)
	if err != nil {
		return "", err
	}
	directory := filepath.Join(parts, "next")
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return "", err
	}
	for name, more := range map[string]string{"mantlet": "", "mantlet-agent": nextMark} {
		text, err := os.ReadFile(filepath.Join(parts, name))
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(directory, name), append(text, more...), 0o755); err != nil {
			return "", err
		}
	}
	archive = filepath.Join(directory, "mantlet.tar")
	return archive, writeImage(ctx, root, directory, Next, archive)
}

// writeImage writes the archive of an image with the programs of a folder.
func writeImage(ctx context.Context, root, programs, name, archive string) error {
	envoy := os.Getenv("MANTLET_ENVOY")
	if envoy == "" {
		envoy = filepath.Join(root, ".cache", "envoy", "envoy")
	}
	if _, err := os.Stat(envoy); err != nil {
		return fmt.Errorf("no Envoy: %w\n  hint: make envoy", err)
	}
	return gotool(ctx, root, "run", "./hack/image", "-bin", programs, "-envoy", envoy, "-name", name, "-o", archive)
}

// sourceTree is where go.mod is.
func sourceTree(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find the source tree: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

func gotool(ctx context.Context, directory string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = directory
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}
