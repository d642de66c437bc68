package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/inject/manifests"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
)

// injectFlags are the flags of inject as they are written.
type injectFlags struct {
	all                                       bool
	files                                     []string
	namespace, output, trustDomain            string
	image, controlPlane, capture, podSecurity string
}

func newInject() *cobra.Command {
	var in injectFlags
	cmd := &cobra.Command{
		Use:   "inject -f DIR|FILE…",
		Short: "Write manifests with the sidecar in their pods, as the webhook would",
		Long: `Inject gives every Pod, and the pods of every Deployment, StatefulSet, DaemonSet, ReplicaSet, Job and CronJob of the manifests, the
sidecar that the webhook would give them, and writes the manifests to standard output. Namespaces that are among the manifests count
with their labels and annotations, as they would in the cluster; the pods of others are given a sidecar. Left out are pods with the
annotation ` + policy.InjectLabel + `: "false", and those to which no policy applies. If one is refused nothing is written.

The same manifests give the same text. With --capture node that holds for the sidecar's user, too, which is derived from namespace, name and containers
of the workload: whoever knows these can compute whose connections pass by the sidecar. The webhook draws at random, also for pods injected so.`,
		Example: "  mantlet inject -f shop/ --image registry.example/mantlet@sha256:… | kubectl apply -f -",
		RunE: func(cmd *cobra.Command, args []string) error {
			in.files = append(in.files, args...)
			return in.run(cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&in.files, "filename", "f", nil, "file or folder with manifests, - for standard input (repeatable)")
	f.StringVarP(&in.namespace, "namespace", "n", "default", "namespace of objects that name none")
	f.StringVarP(&in.output, "output", "o", "yaml", "yaml or json")
	f.BoolVar(&in.all, "inject-all", false, "give every pod a sidecar, also in namespaces among the manifests that are not labelled "+policy.InjectLabel+"=enabled")
	f.StringVar(&in.image, "image", "", "the sidecar's image, pinned by digest (required)")
	f.StringVar(&in.controlPlane, "control-plane", fmt.Sprintf("%s.%s.svc:%d", names.Service, names.SystemNamespace, names.ServicePort), "address of the control plane, as host:port")
	f.StringVar(&in.trustDomain, "trust-domain", "mantlet.local", "SPIFFE trust domain")
	f.StringVar(&in.capture, "capture", string(inject.CaptureSidecar), "who redirects traffic: sidecar (needs NET_ADMIN in the pod) or node")
	f.StringVar(&in.podSecurity, "pod-security", string(inject.PodSecurityEnforced), "whether the cluster enforces Pod Security labels: enforced or off")
	return cmd
}

func (in *injectFlags) run(stdin io.Reader, stdout, stderr io.Writer) error {
	if len(in.files) == 0 {
		return errors.New("no manifests\n  hint: name files or folders with -f, or - for standard input")
	}
	if in.output != "yaml" && in.output != "json" {
		return fmt.Errorf("--output %q: not yaml or json\n  hint: leave it out for yaml", in.output)
	}
	if in.image == "" {
		return errors.New("--image is missing\n  hint: name the image that the cluster's installation uses")
	}
	td, err := spiffeid.TrustDomainFromString(in.trustDomain)
	if err != nil {
		return fmt.Errorf("--trust-domain %q: %w\n  hint: a name such as mantlet.local, of lower-case letters, digits, dots, dashes and underscores", in.trustDomain, err)
	}
	o := manifests.Options{Namespace: in.namespace, Config: inject.Config{
		Image: in.image, ControlPlane: in.controlPlane, TrustDomain: td, Default: in.all,
		Capture: inject.Capture(in.capture), PodSecurity: inject.PodSecurity(in.podSecurity),
	}}
	if err := o.Config.Check(); err != nil {
		return fmt.Errorf("%w\n  hint: mantlet inject --help lists the flags", err)
	}
	files, err := readManifestFiles(in.files, stdin)
	if err != nil {
		return err
	}
	r, err := manifests.Inject(files, o)
	if err != nil {
		return err
	}
	return in.write(r, stdout, stderr)
}

func (in *injectFlags) write(r *manifests.Result, stdout, stderr io.Writer) error {
	for _, w := range r.Warnings {
		fmt.Fprintln(stderr, "warning:", w)
	}
	for _, l := range r.Left {
		fmt.Fprintln(stderr, "no sidecar:", l)
	}
	if len(r.Injected)+len(r.Left) == 0 {
		fmt.Fprintln(stderr, "warning: nothing in these manifests makes pods")
	}
	for i, doc := range r.Documents {
		if in.output == "json" {
			var err error
			if doc, err = manifests.JSON(doc); err != nil {
				return err
			}
		} else if i > 0 {
			doc = append([]byte("---\n"), doc...)
		}
		if _, err := stdout.Write(doc); err != nil {
			return err
		}
	}
	return nil
}

// readManifestFiles reads files of any name, folders with the .yaml, .yml and .json files below them in the order of their names, and
// standard input for "-". Hidden folders are passed over.
func readManifestFiles(paths []string, stdin io.Reader) ([]manifests.File, error) {
	var files []manifests.File
	read := func(path string) error {
		text, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("%w\n  hint: name a file or folder that exists and can be read", err)
		}
		files = append(files, manifests.File{Name: path, Text: text})
		return nil
	}
	for _, path := range paths {
		if path == "-" {
			text, err := io.ReadAll(stdin)
			if err != nil {
				return nil, err
			}
			files = append(files, manifests.File{Name: "stdin", Text: text})
			continue
		}
		info, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("%w\n  hint: name a file or folder that exists", err)
		}
		if !info.IsDir() {
			if err := read(path); err != nil {
				return nil, err
			}
			continue
		}
		before := len(files)
		err = filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case e.IsDir() && p != path && strings.HasPrefix(e.Name(), "."):
				return filepath.SkipDir
			case e.IsDir() || !slices.Contains([]string{".yaml", ".yml", ".json"}, strings.ToLower(filepath.Ext(p))):
				return nil
			}
			return read(p)
		})
		if err != nil {
			return nil, err
		}
		if len(files) == before {
			return nil, fmt.Errorf("%s: no manifests in this folder\n  hint: name a folder that holds .yaml, .yml or .json files", path)
		}
	}
	return files, nil
}
