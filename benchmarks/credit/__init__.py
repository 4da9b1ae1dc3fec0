"""The credit study: what each method's paper claims, asked again on tasks small enough for two CPU cores."""
