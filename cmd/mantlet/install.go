package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/install"
)

func newInstall() *cobra.Command {
	var o install.Options
	var files []string
	var show bool
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Write the manifests of an installation in a cluster",
		Long: `Install writes the manifests of Mantlet's control plane to standard output, and changes nothing itself. The Helm chart in install/chart
makes the same. The same values make the same bytes, so that they can be kept and compared.`,
		Example: "  mantlet install --set image=registry.example/mantlet@sha256:… | kubectl apply --server-side -f -",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if show {
				text, err := install.ShowValues()
				if err == nil {
					_, err = cmd.OutOrStdout().Write(text)
				}
				return err
			}
			for _, f := range files {
				text, err := readValues(f, cmd.InOrStdin())
				if err != nil {
					return fmt.Errorf("--values: %w\n  hint: name a YAML file; mantlet install --show-values is one", err)
				}
				o.Values = append(o.Values, text)
			}
			list, err := install.Render(o)
			if err != nil {
				return err
			}
			for i, m := range list {
				if i > 0 {
					m.Text = append([]byte("---\n"), m.Text...)
				}
				if _, err := cmd.OutOrStdout().Write(m.Text); err != nil {
					return err
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&files, "values", "f", nil, "YAML file with values, - for standard input (repeatable; later ones go over earlier ones)")
	f.StringArrayVar(&o.Set, "set", nil, "a value, as key.key=value (repeatable; over --values)")
	f.StringVarP(&o.Namespace, "namespace", "n", names.SystemNamespace, "namespace of the control plane")
	f.BoolVar(&show, "show-values", false, "write all values, with their defaults and what they mean, and nothing else")
	return cmd
}

func readValues(path string, stdin io.Reader) ([]byte, error) {
	if path == "-" {
		return io.ReadAll(stdin)
	}
	return os.ReadFile(path)
}

func newUninstall() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Write what is to be deleted to remove an installation from a cluster",
		Long: `Uninstall writes the names of the objects of an installation to standard output, in the order in which they are to be deleted: the
webhooks first, so that nothing waits for a control plane that is gone. It changes nothing itself. Pods keep their sidecars, with the last
policies that these know, until they are replaced; new connections between them fail when their certificates end.

So let pods go without sidecars first: take the label mantlet.dev/inject from the namespaces, have their pods made anew (kubectl rollout restart), and see
that mantlet status counts no sidecar any more.

With capture=node there is a CNI plugin on the nodes, too. It stays when the daemon ends, since pods must be closed before they start while the daemon is
upgraded; pods without sidecar start with it as without it, but its folders are the node's. A sidecar that is left would wait for the daemon for ever, and its
pod start no app. Before uninstall, have the DaemonSet take the plugin out of every node, with the values of the installation and node.plugin=removed.`,
		Example: "  # with capture=node, and once no pod has a sidecar:\n" +
			"  mantlet install --set image=… --set capture=node --set node.plugin=removed | kubectl apply --server-side -f -\n" +
			"  kubectl -n " + names.SystemNamespace + " rollout status daemonset/mantlet-node\n" +
			"  # then, and in any case:\n" +
			"  mantlet uninstall | kubectl delete --ignore-not-found -f -\n  kubectl delete configmaps --all-namespaces --field-selector metadata.name=" + names.RootConfigMap,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := install.Render(install.Options{Namespace: namespace, Set: []string{"image=uninstall:0", "capture=node"}}) // only names are of interest; there may be a daemon
			if err != nil {
				return err
			}
			slices.Reverse(list)
			var b strings.Builder
			for i, m := range list {
				if i > 0 {
					b.WriteString("---\n")
				}
				fmt.Fprintf(&b, "apiVersion: %s\nkind: %s\nmetadata:\n  name: %s\n", m.APIVersion, m.Kind, m.Name)
				if m.Namespace != "" {
					fmt.Fprintf(&b, "  namespace: %s\n", m.Namespace)
				}
			}
			_, err = io.WriteString(cmd.OutOrStdout(), b.String())
			return err
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", names.SystemNamespace, "namespace of the control plane")
	return cmd
}
